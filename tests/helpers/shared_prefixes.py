"""Batches whose seqs begin with the same blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.upcoming.prefix_groups import PrefixGroup
from tests.helpers.poisoned_cache import PoisonedCache, poisoned_cache

BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBatch:
    cache: PoisonedCache
    q: Tensor  # [num_tokens, num_q_heads, head_dim], a slice of a wider tensor
    cu_seqlens_q: Tensor  # int32 [num_seqs + 1]


def shared_batch(
    groups: Sequence[PrefixGroup],
    own_lens: Sequence[int],
    num_new: Sequence[int],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SharedBatch:
    """Seqs that each have own_lens tokens after the prefix of their group."""
    prefix_blocks = [0] * len(own_lens)
    for one in groups:
        prefix_blocks[one.first_seq : one.first_seq + one.num_seqs] = [one.num_blocks] * one.num_seqs
    lens = [own + blocks * BLOCK_SIZE for own, blocks in zip(own_lens, prefix_blocks, strict=True)]
    cache = poisoned_cache(
        lens, block_size=BLOCK_SIZE, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=device
    )
    for one in groups:
        same = cache.block_table[one.first_seq, : one.num_blocks].clone()
        cache.block_table[one.first_seq : one.first_seq + one.num_seqs, : one.num_blocks] = same
    num_tokens, num_q_heads = sum(num_new), num_kv_heads * group
    fused = torch.randn(num_tokens, num_q_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    bounds = torch.tensor([0, *num_new], device=device).cumsum(0, dtype=torch.int32)
    return SharedBatch(cache=cache, q=fused[:, :num_q_heads], cu_seqlens_q=bounds)
