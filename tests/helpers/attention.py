"""Seqs in a poisoned paged cache, and the right results of attention over them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.paged_attention import paged_attention, paged_attention_reference

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Case:
    """Seqs, each (length, new tokens), in a cache that holds `poison` wherever it holds none of their keys."""

    seqs: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    neighbours: bool = False
    poison: float = torch.nan
    device: torch.device = CPU
    ancestors: Tensor | None = None  # int64 [num_tokens]
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        num_q_heads, num_kv_heads = self.heads
        num_tokens = sum(new for _, new in self.seqs)
        # q is the first part of a fused projection, as in a model.
        fused = torch.randn(num_tokens, num_q_heads + 2 * num_kv_heads, self.head_dim).to(self.dtype)
        self.q = fused[:, :num_q_heads]
        blocks_of = [-(-length // self.block_size) for length, _ in self.seqs]
        num_blocks = sum(blocks_of) + 3
        order = torch.arange(num_blocks) if self.neighbours else torch.randperm(num_blocks)
        self.block_table = torch.full((len(self.seqs), max(blocks_of, default=0) + 2), -7, dtype=torch.int32)
        cache_shape = (num_blocks, self.block_size, num_kv_heads, self.head_dim)
        self.k_cache = torch.full(cache_shape, self.poison, dtype=self.dtype)
        self.v_cache = self.k_cache.clone()
        self.keys, self.values = [], []
        first = 1
        for row, (length, _) in enumerate(self.seqs):
            blocks = order[first : first + blocks_of[row]]
            first += blocks_of[row]
            self.block_table[row, : blocks_of[row]] = blocks
            self.keys.append(torch.randn(length, num_kv_heads, self.head_dim).to(self.dtype))
            self.values.append(torch.randn(length, num_kv_heads, self.head_dim).to(self.dtype))
            for position in range(length):
                block, offset = int(blocks[position // self.block_size]), position % self.block_size
                self.k_cache[block, offset] = self.keys[row][position]
                self.v_cache[block, offset] = self.values[row][position]

    def arguments(self) -> dict[str, Tensor]:
        new = torch.tensor([0] + [new for _, new in self.seqs])
        arguments = {
            "q": self.q,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "block_table": self.block_table,
            "seq_lens": torch.tensor([length for length, _ in self.seqs], dtype=torch.int32),
            "cu_seqlens_q": new.cumsum(0).int(),
        }
        return {name: x if x.device == self.device else x.to(self.device) for name, x in arguments.items()}

    def _words(self) -> Tensor | None:
        return None if self.ancestors is None else self.ancestors.to(self.device)

    @property
    def softmax_scale(self) -> float:
        return 0.7 * self.head_dim**-0.5  # not SDPA's default

    def run(self, *, batch_invariant: bool = False) -> Tensor:
        return paged_attention(
            **self.arguments(),
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            ancestors=self._words(),
            batch_invariant=batch_invariant,
        )

    def run_with_lse(self, *, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
        return paged_attention(
            **self.arguments(),
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            ancestors=self._words(),
            return_lse=True,
            batch_invariant=batch_invariant,
        )

    def run_reference(self) -> tuple[Tensor, Tensor]:
        return paged_attention_reference(
            **self.arguments(),
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            ancestors=self._words(),
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in fp64, token by token, over exactly the keys that the token sees: no mask, no cache."""
        results, sums = [torch.empty(0, self.heads[0], self.head_dim)], [torch.empty(0, self.heads[0])]
        for row, (length, new) in enumerate(self.seqs):
            for index in range(new):
                seen = self._seen(len(results) - 1, length - new, index)
                k, v = (
                    x[row][seen].double().repeat_interleave(self.heads[0] // self.heads[1], dim=1)
                    for x in (self.keys, self.values)
                )
                scores = (self.q[len(results) - 1].double() * k).sum(-1) * self.softmax_scale  # [keys, num_q_heads]
                weights = scores.exp()
                results.append(((weights.unsqueeze(-1) * v).sum(0) / weights.sum(0).unsqueeze(-1)).unsqueeze(0))
                sums.append(weights.sum(0).log().unsqueeze(0))
        return torch.cat(results).to(self.device), torch.cat(sums).to(self.device)

    def _seen(self, token: int, num_prefix: int, index: int) -> list[int]:
        """The slots that a new token sees: number `index` of its seq, number `token` of the batch. A tree's path reads
        as a chain."""
        path = list(range(index + 1))
        if self.ancestors is not None:
            word = int(self.ancestors[token])
            path = [j for j in range(64) if word >> j & 1]  # in Python, >> of a negative number keeps ones coming
        chain = list(range(num_prefix)) + [num_prefix + j for j in path]
        return chain if self.sliding_window is None else chain[-self.sliding_window :]


def tree_words(parents: list[int | None]) -> list[int]:
    """The bit mask of the ancestors of each node, as int64; a parent comes before its children."""
    words: list[int] = []
    for node, parent in enumerate(parents):
        words.append(1 << node | (0 if parent is None else words[parent]))
    return [word - (1 << 64) if word >> 63 else word for word in words]
