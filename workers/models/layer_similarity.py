"""How similar the inputs of a draft's layers are, which decides which layers may attend at once.

Measured once at load, with the exact model on a bundled text. It runs one layer at a time, so that only one layer's
weights are in memory besides what the process already holds.
"""

from pathlib import Path

import torch
from torch import Tensor

from checkpoint.config import ModelConfig
from checkpoint.config_json import load_model_config
from checkpoint.errors import LoadError
from workers.collectives import SoloGroup
from workers.layers.context import BuildContext
from workers.layers.rope import cos_sin_cache
from workers.layers.vocab import VocabParallelEmbedding
from workers.models.checkpoint import Checkpoint, Progress
from workers.models.decoder import DecoderLayer, KVCache, make_step
from workers.models.sample_text import MAX_TOKENS, one_seq, sample_token_ids


def layer_input_similarity(
    folder: Path,
    *,
    num_layers: int = 0,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    progress: Progress,
) -> list[list[float]]:
    """Mean cosine between the streams that enter two layers: [num_layers][num_layers], symmetric. num_layers: only of
    so many layers, the first ones; 0: of all.

    Raises:
        LoadError: The folder is damaged, or has no tokenizer.json.
    """
    whole = load_model_config(folder)
    config = whole.first_layers(num_layers)
    token_ids = sample_token_ids(folder, min(MAX_TOKENS, max_model_len), config.vocab_size)
    if token_ids is None:
        raise LoadError(
            f"draft.layer_groups: {folder} has no tokenizer.json, so the layers cannot be compared on a text",
            "name the groups, for instance [[0], [1, 2], [3, 4], [5]]",
        )
    with torch.inference_mode():
        streams = _streams(Checkpoint(folder, whole), config, token_ids.to(device), dtype, progress)
        unit = torch.nn.functional.normalize(streams.float(), dim=-1)  # [num_layers, num_tokens, hidden_size]
        similarity: list[list[float]] = (torch.einsum("ath,bth->ab", unit, unit) / unit.shape[1]).tolist()
    return similarity


def _streams(
    checkpoint: Checkpoint, config: ModelConfig, token_ids: Tensor, dtype: torch.dtype, progress: Progress
) -> Tensor:  # [num_layers, num_tokens, hidden_size]
    """The input of each layer, if the token ids are one seq."""

    def context() -> BuildContext:
        return BuildContext(SoloGroup(), dtype=dtype, device=token_ids.device, batch_invariant=False)

    def read(ctx: BuildContext) -> None:
        checkpoint.read(ctx.slices)

    ctx = context()
    embedding = VocabParallelEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, ctx=ctx)
    read(ctx)
    stream = embedding(token_ids)
    del ctx, embedding
    device, shape = token_ids.device, (1, len(token_ids), config.num_kv_heads, config.head_dim)
    kv_cache: KVCache = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    cos_sin = cos_sin_cache(config.rope, head_dim=config.head_dim, num_positions=len(token_ids), device=device)
    step = make_step(one_seq(token_ids), cos_sin, kv_cache)
    streams = []
    for layer in range(config.num_layers):
        progress(layer, config.num_layers)
        streams.append(stream)
        ctx = context()
        decoder_layer = DecoderLayer(layer, config=config, ctx=ctx)
        read(ctx)
        hidden, residual = decoder_layer(stream.clone(), None, step, kv_cache)
        stream = residual + hidden
    return torch.stack(streams)
