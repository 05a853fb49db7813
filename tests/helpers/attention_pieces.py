"""Seqs whose attention can be computed in any chunks and batches, with `batch_invariant`."""

import torch
from torch import Tensor

from kernels.attention.paged_attention import paged_attention

CPU = torch.device("cpu")
BLOCK_SIZE = 16


class Seqs:
    """A few seqs with all their queries, keys and values. Any chunks of them can be computed in any batch."""

    def __init__(
        self,
        lengths: list[int],
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        *,
        neighbours: bool = False,
        device: torch.device = CPU,
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.lengths, self.head_dim = lengths, head_dim
        self.q = [torch.randn(length, heads[0], head_dim).to(dtype) for length in lengths]
        blocks_of = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.arange(sum(blocks_of)) if neighbours else torch.randperm(sum(blocks_of))
        self.tables = list(torch.split(order.int(), blocks_of))
        self.k_cache, self.v_cache = torch.randn(2, len(order), BLOCK_SIZE, heads[1], head_dim).to(dtype)

    def attend(self, pieces: list[tuple[int, int, int]], sliding_window: int | None = None) -> list[Tensor]:
        """For each chunk (seq, start, end), the results of these tokens, all computed in one call."""
        sizes = [end - start for _, start, end in pieces]
        tensors = (
            torch.cat([self.q[seq][start:end] for seq, start, end in pieces]),
            self.k_cache,
            self.v_cache,
            torch.nn.utils.rnn.pad_sequence([self.tables[seq] for seq, _, _ in pieces], batch_first=True),
            torch.tensor([end for _, _, end in pieces], dtype=torch.int32),
            torch.tensor([0, *sizes]).cumsum(0).int(),
        )
        out = paged_attention(
            *(x.to(self.device) for x in tensors),
            softmax_scale=self.head_dim**-0.5,
            sliding_window=sliding_window,
            batch_invariant=True,
        )
        return list(torch.split(out, sizes))

    def in_chunks(self, seq: int, size: int, sliding_window: int | None = None) -> Tensor:
        length = self.lengths[seq]
        starts = range(0, length, size)
        pieces = [[(seq, start, min(start + size, length))] for start in starts]
        return torch.cat([self.attend(piece, sliding_window)[0] for piece in pieces])
