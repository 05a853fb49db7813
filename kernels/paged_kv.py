"""The new tokens of each seq of an attention call, and its keys and values in the paged cache (CPU side)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqRows:
    """The new tokens of one seq, and where its keys lie."""

    first_token: int  # row in q
    num_tokens: int
    first_position: int
    blocks: list[int]
    neighbours: bool  # the blocks follow each other in memory

    @property
    def num_keys(self) -> int:
        return self.first_position + self.num_tokens

    def read(self, cache: Tensor, start: int, end: int) -> Tensor:
        """Keys or values at positions [start, end): [end - start, num_kv_heads, head_dim]; a view if neighbours."""
        block_size = cache.shape[1]
        slots = cache.view(-1, *cache.shape[2:])
        if self.neighbours:
            return slots.narrow(0, self.blocks[0] * block_size + start, end - start)
        first, last = start // block_size, -(-end // block_size)
        gathered = cache.index_select(0, torch.tensor(self.blocks[first:last])).flatten(0, 1)
        return gathered.narrow(0, start - first * block_size, end - start)


def rows_of_seqs(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *, num_tokens: int, num_blocks: int, block_size: int
) -> list[SeqRows]:
    """One entry for each seq that has new tokens. Raises ValueError for lengths and blocks that cannot be."""
    bounds, lens, table = cu_seqlens_q.tolist(), seq_lens.tolist(), block_table.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens_q: expected to run from 0 to {num_tokens}, got {bounds[0]} to {bounds[-1]}")
    seqs = []
    for seq, seq_len in enumerate(lens):
        num_new = bounds[seq + 1] - bounds[seq]
        if not 0 <= num_new <= seq_len:
            raise ValueError(f"seq_lens: seq {seq} has {num_new} new tokens, but a length of {seq_len}")
        if num_new == 0:
            continue
        blocks = table[seq][: -(-seq_len // block_size)]
        if len(blocks) * block_size < seq_len:
            raise ValueError(f"block_table: seq {seq} has {seq_len} tokens, but {len(blocks)} blocks of {block_size}")
        if min(blocks) < 0 or max(blocks) >= num_blocks:
            raise ValueError(f"block_table: seq {seq} names a block outside 0..{num_blocks - 1}: {blocks}")
        seqs.append(
            SeqRows(
                first_token=bounds[seq],
                num_tokens=num_new,
                first_position=seq_len - num_new,
                blocks=blocks,
                neighbours=blocks == list(range(blocks[0], blocks[0] + len(blocks))),
            )
        )
    return seqs
