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
from checkpoint.tokenizer import TOKENIZER_FILE, load_tokenizer
from kernels.attention.paged_kv import SeqLengths
from workers.collectives import SoloGroup
from workers.layers.context import BuildContext
from workers.layers.rope import cos_sin_cache
from workers.layers.vocab import VocabParallelEmbedding
from workers.models.batch import Batch
from workers.models.checkpoint import Checkpoint, Progress
from workers.models.decoder import DecoderLayer, KVCache, Step, make_step

MAX_TOKENS = 256

# Prose, dialogue and code, because layers differ more on some texts than on others.
TEXT = '''The harbour was quiet before sunrise. Two fishing boats lay side by side at the wooden pier, and between them
a heron stood in the shallow water without moving. "If the wind turns," said the older man, "we shall be back by noon.
If it does not, keep some soup for us." His daughter laughed, because he said the same thing every Friday, and because
the wind had turned only once in all those years.

def merge_intervals(intervals):
    """Join overlapping (start, end) pairs and return them in order."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged

Water boils at 100 degrees Celsius at sea level, but at about 93 degrees on a mountain of 2000 metres, since the air
presses less on its surface. That is why potatoes need longer there: 25 minutes instead of 20. Which of the following
statements follows from this? (a) Cooking time depends on pressure. (b) Potatoes grow better in valleys. (c) Water is
lighter on mountains. The answer is (a); neither of the others says anything about temperature.
'''


def layer_input_similarity(
    folder: Path, *, dtype: torch.dtype, device: torch.device, max_model_len: int, progress: Progress
) -> list[list[float]]:
    """Mean cosine between the streams that enter two layers: [num_layers][num_layers], symmetric.

    Raises:
        LoadError: The folder is damaged, or has no tokenizer.json.
    """
    config = load_model_config(folder)
    token_ids = _token_ids(folder, min(MAX_TOKENS, max_model_len), config.vocab_size)
    with torch.inference_mode():
        streams = _streams(Checkpoint(folder, config), config, token_ids.to(device), dtype, progress)
        unit = torch.nn.functional.normalize(streams.float(), dim=-1)  # [num_layers, num_tokens, hidden_size]
        similarity: list[list[float]] = (torch.einsum("ath,bth->ab", unit, unit) / unit.shape[1]).tolist()
    return similarity


def _token_ids(folder: Path, max_tokens: int, vocab_size: int) -> Tensor:  # int64 [num_tokens]
    if not (folder / TOKENIZER_FILE).exists():
        raise LoadError(
            f"draft.layer_groups: {folder} has no {TOKENIZER_FILE}, so the layers cannot be compared on a text",
            "name the groups, for instance [[0], [1, 2], [3, 4], [5]]",
        )
    token_ids = load_tokenizer(folder).encode(TEXT).ids[:max_tokens]
    return torch.tensor([token_id for token_id in token_ids if token_id < vocab_size] or [0])


def _streams(
    checkpoint: Checkpoint, config: ModelConfig, token_ids: Tensor, dtype: torch.dtype, progress: Progress
) -> Tensor:  # [num_layers, num_tokens, hidden_size]
    """The input of each layer, if the token ids are one seq."""

    def context() -> BuildContext:
        return BuildContext(SoloGroup(), dtype=dtype, device=token_ids.device, batch_invariant=False)

    def read(ctx: BuildContext) -> None:
        checkpoint.read(ctx.slices, lambda done, total: None)

    ctx = context()
    embedding = VocabParallelEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, ctx=ctx)
    read(ctx)
    stream = embedding(token_ids)
    del ctx, embedding
    step, kv_cache = _one_seq(token_ids, config, dtype)
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


def _one_seq(token_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Step, KVCache]:
    """A prefill of one block, and a cache for one layer."""
    num_tokens, device = token_ids.shape[0], token_ids.device
    shape = (1, num_tokens, config.num_kv_heads, config.head_dim)
    kv_cache = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    positions = torch.arange(num_tokens, device=device)
    seq_lens, cu_seqlens_q = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([num_tokens], [0, num_tokens]))
    batch = Batch(
        input_ids=token_ids,
        positions=positions,
        slot_mapping=positions,
        block_table=torch.zeros((1, 1), dtype=torch.int32, device=device),
        seq_lens=seq_lens.to(device),
        cu_seqlens_q=cu_seqlens_q.to(device),
        lengths=SeqLengths.read(seq_lens, cu_seqlens_q),
    )
    cos_sin = cos_sin_cache(config.rope, head_dim=config.head_dim, num_positions=num_tokens, device=device)
    return make_step(batch, cos_sin, kv_cache), kv_cache
