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
    """The largest working set of one forward: four hidden states of each token, the result among them, and all that a
    layer computes. The native kernels of a CPU keep these side by side; what torch frees in between makes it less."""
    q = config.num_q_heads // tp_size * config.head_dim
    kv = config.kv_heads_per_rank(tp_size) * config.head_dim
    mlp = 3 * config.intermediate_size // tp_size  # gate, up and their product
    norms = q + kv if config.qk_norm else 0
    values = 4 * config.hidden_size + (q + 2 * kv) + norms + q + mlp
    return num_tokens * (values * value_bytes + config.head_dim * _ANGLE_BYTES)
