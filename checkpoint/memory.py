"""The memory that choosing tokens takes: what the plan expects and the worker reserves."""

SAMPLING_TILE_ROWS = 512
"""Rows of logits that are held at a time. Twice the default max_num_seqs, so a decode round stays one tile. The head is
read once a tile, and a product of 512 rows takes longer than reading its weights on any GPU. A copy of the logits takes
256 MiB with a vocabulary of 128k."""

_LOGIT_COPIES = 6  # fp32 temporaries of sampling with truncation, per logit
_LOGIT_BYTES = 4


def num_sampled_rows(*, verifies: bool, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """The most rows for which tokens are chosen at once: a target that verifies may need every token of a round, a
    draft chooses one for each seq."""
    wanted = max_num_batched_tokens if verifies else max_num_seqs
    return min(wanted, SAMPLING_TILE_ROWS)


def sampling_bytes(*, vocab_size: int, num_ranks: int, num_rows: int) -> int:
    """Bytes on one of `num_ranks` ranks that share the vocabulary."""
    shard_size = -(-vocab_size // num_ranks)
    return num_rows * shard_size * _LOGIT_BYTES * _LOGIT_COPIES
