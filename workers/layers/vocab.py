"""Embedding and output head, split over the ranks by vocabulary."""

import torch.nn.functional as F
from torch import Tensor

from kernels.layers.linear import Weight
from workers.layers.context import BuildContext


def vocab_range(vocab_size: int, rank: int, tp_size: int) -> tuple[int, int]:
    """Token ids [start, end) of a rank: ceil(vocab_size / tp_size) each, fewer on the last ranks."""
    size = -(-vocab_size // tp_size)
    return min(rank * size, vocab_size), min((rank + 1) * size, vocab_size)


class VocabParallelEmbedding:
    """Rows of other ranks' tokens are zero here, so the sum over the ranks is the embedding."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, *, ctx: BuildContext) -> None:
        self._all_reduce = ctx.group.all_reduce
        self._start, end = vocab_range(vocab_size, ctx.group.rank, ctx.group.size)
        self._size = end - self._start
        self.weight = ctx.empty(self._size, hidden_size)
        ctx.read(f"{name}.weight", (vocab_size, hidden_size), self.weight, start=self._start)

    def __call__(self, token_ids: Tensor) -> Tensor:  # int64 [num_tokens] -> [num_tokens, hidden_size]
        local = token_ids - self._start
        foreign = (local < 0) | (local >= self._size)
        rows = F.embedding(local.masked_fill_(foreign, 0), self.weight)
        return self._all_reduce(rows.masked_fill_(foreign.unsqueeze(1), 0))


class ParallelLMHead:
    """Logits of this rank's tokens. Uses the embedding's weight if they are tied."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, *, tied_to: Tensor | None, ctx: BuildContext
    ) -> None:
        self._linear = ctx.linear
        self.vocab_range = vocab_range(vocab_size, ctx.group.rank, ctx.group.size)
        if tied_to is not None:
            # Packing makes a copy (on CPU, or rounded), because the embedding reads rows of the original. In a small
            # draft the head is the largest matrix, and its product takes half the time when packed.
            self.weight: Weight = tied_to
            ctx.packable(self, ctx.head_format, is_shared=True)
            return
        start, end = self.vocab_range
        weight = ctx.matrix(end - start, hidden_size, ctx.head_format)
        self.weight = weight
        ctx.read(f"{name}.weight", (vocab_size, hidden_size), weight, start=start)
        ctx.packable(self, ctx.head_format)

    def __call__(self, hidden: Tensor) -> Tensor:  # [rows, hidden_size] -> fp32 [rows, end - start]
        return self._linear(hidden, self.weight, None).float()
