"""The memory that choosing tokens and turning heads takes: what the plan expects and the worker has."""

from checkpoint.config import ModelConfig

SAMPLING_TILE_ROWS = 256
"""Rows of logits that are held at a time: the default max_num_seqs, so a decode round stays one tile. The head is read
once a tile; on an H200 a product of about 200 rows takes as long as reading its weights. A copy of the logits takes
128 MiB with a vocabulary of 128k."""

# fp32 values held for each logit while a token is chosen with truncation, penalties and log-probabilities, all at once.
# Measured on CPU: 9.1 (tests/unit/test_sampling_tiles.py).
_LOGIT_COPIES = 10
_LOGIT_BYTES = 4
_ANGLE_BYTES = 4  # fp32


def num_sampled_rows(*, verifies: bool, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """The most rows for which tokens are chosen at once: a target that verifies may need every token of a round, a
    draft chooses one for each seq."""
    wanted = max_num_batched_tokens if verifies else max_num_seqs
    return min(wanted, SAMPLING_TILE_ROWS)


def sampling_bytes(*, vocab_size: int, num_ranks: int, num_rows: int) -> int:
    """Bytes on one of `num_ranks` ranks that share the vocabulary."""
    shard_size = -(-vocab_size // num_ranks)
    return num_rows * shard_size * _LOGIT_BYTES * _LOGIT_COPIES


def rope_table_bytes(*, head_dim: int, num_positions: int) -> int:
    """Bytes of cosines and sines that every rank holds, as it holds weights: half a GiB for a million positions."""
    return num_positions * head_dim * _ANGLE_BYTES


def forward_bytes(config: ModelConfig, tp_size: int, *, num_tokens: int, value_bytes: int) -> int:
    """Estimate of the largest working set of one forward, that of one layer: hidden states and residual, the fused
    query-key-value or gate-up product and its result."""
    qkv = (config.num_q_heads // tp_size + 2 * config.kv_heads_per_rank(tp_size)) * config.head_dim
    mlp = 3 * config.intermediate_size // tp_size
    return num_tokens * (3 * config.hidden_size + max(2 * qkv, mlp)) * value_bytes
