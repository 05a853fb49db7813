"""The new tokens of each seq of an attention call, and where its keys and values are, as the host sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# New tokens and keys of a seq. A larger seq gets its own call, and its keys are not gathered.
_MAX_GATHERED_TOKENS = 16
_MAX_GATHERED_KEYS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqRows:
    """The new tokens of one seq, and where its keys are."""

    first_token: int  # row in q
    num_tokens: int
    first_position: int
    blocks: list[int]
    neighbours: bool  # the blocks are consecutive in memory

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


@dataclass(frozen=True, slots=True)
class SeqBatch:
    """Several seqs, side by side, with equally many new tokens; none has more than twice as many keys as another.

    A seq with fewer keys than the longest is padded with its last key.
    """

    num_seqs: int
    num_new: int  # tokens of each
    num_keys: int  # of the longest
    tokens: Tensor  # int64 [num_seqs * num_new], rows in q
    slots: Tensor  # int64 [num_seqs * num_keys]
    visible: Tensor | None  # bool [num_seqs, num_new, num_keys]; None where every token sees all keys

    @classmethod
    def of(cls, seqs: Sequence[SeqRows], block_size: int) -> "SeqBatch":
        num_new, num_keys = seqs[0].num_tokens, max(seq.num_keys for seq in seqs)
        new, keys = np.arange(num_new), np.arange(num_keys)
        tokens = np.empty((len(seqs), num_new), np.int64)
        slots = np.empty((len(seqs), num_keys), np.int64)
        visible = np.empty((len(seqs), num_new, num_keys), np.bool_)
        for index, seq in enumerate(seqs):
            own = np.minimum(keys, seq.num_keys - 1)
            tokens[index] = seq.first_token + new
            slots[index] = np.array(seq.blocks)[own // block_size] * block_size + own % block_size
            visible[index] = keys <= seq.first_position + new[:, None]
        return cls(
            num_seqs=len(seqs),
            num_new=num_new,
            num_keys=num_keys,
            tokens=torch.from_numpy(tokens.reshape(-1)),
            slots=torch.from_numpy(slots.reshape(-1)),
            visible=None if visible.all() else torch.from_numpy(visible),
        )


@dataclass(frozen=True, slots=True)
class AlikeSeqs:
    """Seqs with equally many new tokens; none has more than twice as many keys as another."""

    seqs: Sequence[SeqRows]
    batch: SeqBatch | None  # all of them together, if there are several


def alike_seqs(seqs: Sequence[SeqRows], block_size: int) -> list[AlikeSeqs]:
    """Group seqs that a SeqBatch can hold together."""
    by_kind: dict[tuple[int, int], list[SeqRows]] = {}
    for seq in seqs:
        by_kind.setdefault((seq.num_tokens, seq.num_keys.bit_length()), []).append(seq)
    return [
        AlikeSeqs(members, SeqBatch.of(members, block_size) if _are_short(members) else None)
        for members in by_kind.values()
    ]


def _are_short(seqs: Sequence[SeqRows]) -> bool:
    """Whether these are several seqs that may be worth gathering. The size of a key matters too."""
    return len(seqs) > 1 and seqs[0].num_tokens <= _MAX_GATHERED_TOKENS and seqs[0].num_keys <= _MAX_GATHERED_KEYS


@dataclass(frozen=True, slots=True)
class SeqLengths:
    """How long each seq is and how many of its tokens are new, on the host."""

    seq_lens: NDArray[np.int32]  # [num_seqs], the new tokens included
    cu_seqlens_q: NDArray[np.int32]  # [num_seqs + 1]

    @classmethod
    def read(cls, seq_lens: Tensor, cu_seqlens_q: Tensor) -> "SeqLengths":
        """Read the lengths from tensors. Waits if they are on a device."""
        return cls(seq_lens.cpu().numpy(), cu_seqlens_q.cpu().numpy())

    @property
    def num_new(self) -> NDArray[np.int64]:
        return (self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]).astype(np.int64)

    def check(self, *, num_tokens: int, max_blocks: int, block_size: int) -> None:
        """Raises ValueError for lengths that do not fit this many new tokens and this many blocks per seq."""
        bounds = self.cu_seqlens_q.tolist()  # Python numbers: for a few seqs, numpy takes ten times as long
        if bounds[0] != 0 or bounds[-1] != num_tokens:
            raise ValueError(f"cu_seqlens_q: expected to run from 0 to {num_tokens}, got {bounds[0]} to {bounds[-1]}")
        for seq, seq_len in enumerate(self.seq_lens.tolist()):
            num_new = bounds[seq + 1] - bounds[seq]
            if not 0 <= num_new <= seq_len:
                raise ValueError(f"seq_lens: seq {seq} has {num_new} new tokens, but a length of {seq_len}")
            if num_new and seq_len > max_blocks * block_size:
                raise ValueError(
                    f"block_table: seq {seq} has {seq_len} tokens, but {max_blocks} blocks of {block_size}"
                )


@dataclass(frozen=True, slots=True)
class LengthBounds:
    """All that the host knows of lengths if only the device knows them: those of a captured step change from replay to
    replay. Tokens after the last seq's belong to no seq, and seqs of length 0 have no tokens: both are padding."""

    num_seqs: int
    max_new: int  # most new tokens of a seq


def rows_of_seqs(block_table: Tensor, lengths: SeqLengths, *, num_blocks: int, block_size: int) -> list[SeqRows]:
    """One entry for each seq with new tokens. The lengths must have been checked.

    Raises ValueError for impossible blocks.
    """
    bounds, lens, table = lengths.cu_seqlens_q.tolist(), lengths.seq_lens.tolist(), block_table.tolist()
    seqs = []
    for seq, seq_len in enumerate(lens):
        num_new = bounds[seq + 1] - bounds[seq]
        if num_new == 0:
            continue
        blocks = table[seq][: -(-seq_len // block_size)]
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
