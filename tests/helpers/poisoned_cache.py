"""A paged cache in random page order, with NaN wherever no seq has a key or value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PoisonedCache:
    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: Tensor
    block_table: Tensor  # int32 [num_seqs, max_blocks]; entries that a seq does not use name a block of NaN
    seq_lens: Tensor  # int32 [num_seqs]
    keys: list[Tensor]  # of each seq [seq_len, num_kv_heads, head_dim]
    values: list[Tensor]


def poisoned_cache(
    seq_lens: Sequence[int],
    *,
    block_size: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PoisonedCache:
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(1, *(-(-seq_len // block_size) for seq_len in seq_lens))
    order = torch.randperm(len(seq_lens) * max_blocks + 1, generator=generator).int()
    table = order[1:].view(len(seq_lens), max_blocks).clone()
    caches = torch.full((2, len(order), block_size, num_kv_heads, head_dim), torch.nan)
    for seq, seq_len in enumerate(seq_lens):
        num_blocks = -(-seq_len // block_size)
        table[seq, num_blocks:] = order[0]
        for position in range(seq_len):
            block = int(table[seq, position // block_size])
            caches[:, block, position % block_size] = torch.randn(2, num_kv_heads, head_dim, generator=generator)
    k_cache, v_cache = caches.to(device=device, dtype=dtype)

    def of_seqs(cache: Tensor) -> list[Tensor]:
        return [cache[row.long()].flatten(0, 1)[:n] for row, n in zip(table, seq_lens, strict=True)]

    return PoisonedCache(
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=table.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        keys=of_seqs(k_cache),
        values=of_seqs(v_cache),
    )
