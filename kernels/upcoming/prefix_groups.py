"""Decides from block tables and lengths which seqs of a batch read the keys of a common prefix together.

It pays if the prefix reads saved outweigh the merge of two results per query token (shared_prefix.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MAX_QUERY_TOKENS = 64  # that can attend to a prefix as one seq: the bits of a word of `ancestors`
_ROWS_PER_PASS = 64  # query heads of tokens that one reading of the keys serves (schedule.py)
# What a GPU of 3.3 TB/s reads in the 5 us that two more launches take. Not measured yet.
_LAUNCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixGroup:
    """Consecutive seqs of a batch whose block tables begin with the same blocks, all of them full."""

    first_seq: int
    num_seqs: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What decides the bytes of an attention call besides lengths."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    element_size: int  # bytes


def prefix_saving_bytes(num_prefix_tokens: int, num_new: Sequence[int], shape: KVShape) -> int:
    """Bytes saved per layer if seqs with `num_new` query tokens share the reading of a prefix.

    The saved keys and values, minus the results of the parts, which are written and read once more.
    """
    group = shape.num_q_heads // shape.num_kv_heads
    kv_bytes = 2 * num_prefix_tokens * shape.num_kv_heads * shape.head_dim * shape.element_size
    alone = sum(_passes(tokens, group) for tokens in num_new)
    together = sum(_passes(tokens, group) for tokens in query_chunks(sum(num_new), num_prefix_tokens))
    # Two parts written and read, one result written, for one result written; and two fp32 lse, written and read.
    merge_bytes = sum(num_new) * shape.num_q_heads * (4 * shape.head_dim * shape.element_size + 4 * 4)
    return (alone - together) * kv_bytes - merge_bytes


def choose_prefix_groups(
    block_tables: Sequence[Sequence[int]],
    seq_lens: Sequence[int],
    num_new: Sequence[int],
    shape: KVShape,
    *,
    launch_bytes: int = _LAUNCH_BYTES,
) -> list[PrefixGroup]:
    """The runs of consecutive seqs for which sharing the reading of their common prefix pays.

    All three hold one entry per seq; num_new: its query tokens, whose keys are not part of any prefix. The saving of
    all groups together has to exceed launch_bytes, the bytes that the device could move in the time of the extra
    launches.
    """
    groups, saving = [], 0
    for first, end in _runs(block_tables):
        cached_blocks = [(seq_lens[seq] - num_new[seq]) // shape.block_size for seq in range(first, end)]
        num_blocks = min(_num_common(block_tables[first:end]), *cached_blocks)
        if num_blocks == 0:
            continue
        saved = prefix_saving_bytes(num_blocks * shape.block_size, num_new[first:end], shape)
        if saved > 0:
            groups.append(PrefixGroup(first_seq=first, num_seqs=end - first, num_blocks=num_blocks))
            saving += saved
    return groups if saving > launch_bytes else []


def query_chunks(num_tokens: int, num_prefix_tokens: int) -> list[int]:
    """Sizes of the pieces, no longer than the prefix, in which the query tokens of a group attend to it."""
    size = min(_MAX_QUERY_TOKENS, num_prefix_tokens)
    whole, rest = divmod(num_tokens, size)
    return [size] * whole + [rest] * (rest > 0)


def _passes(num_tokens: int, group: int) -> int:
    """How often the keys of a seq are read for its query tokens."""
    return -(-num_tokens * group // _ROWS_PER_PASS)


def _runs(block_tables: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive seqs whose first block is the same: [first, end)."""
    first = 0
    for seq in range(1, len(block_tables) + 1):
        if seq == len(block_tables) or block_tables[seq][:1] != block_tables[first][:1]:
            if block_tables[first]:
                yield first, seq
            first = seq


def _num_common(block_tables: Sequence[Sequence[int]]) -> int:
    """Leading blocks that all tables share."""
    for column, blocks in enumerate(zip(*block_tables, strict=False)):
        if len(set(blocks)) > 1:
            return column
    return min(len(table) for table in block_tables)
