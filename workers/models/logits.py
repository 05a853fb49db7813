"""Logits as the sampler takes them."""

import torch.nn.functional as F
from torch import Tensor

from workers.models.decoder import CausalLM
from workers.models.layer_parallel_decoder import LayerParallelLM


def shard_logits(model: CausalLM | LayerParallelLM, hidden: Tensor, num_ranks: int) -> Tensor:
    """Logits [num_rows, shard_size] of this rank, of rows of hidden [num_rows, hidden_size]; the last shards of an
    uneven vocabulary are padded."""
    logits = model.compute_logits(hidden)
    shard_size = -(-model.config.vocab_size // num_ranks)
    return logits if logits.shape[1] == shard_size else F.pad(logits, (0, shard_size - logits.shape[1]))
