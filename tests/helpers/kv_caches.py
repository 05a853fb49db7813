"""KV caches of several layers in which every slot holds different numbers."""

from itertools import chain

import torch
from torch import Tensor

from kernels.kv.block_copy import KVCaches

Caches = list[tuple[Tensor, Tensor]]


def random_caches(
    num_blocks: int,
    *,
    num_layers: int = 3,
    block_size: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Caches:
    generator = torch.Generator().manual_seed(0)
    shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
    numbers = torch.randn(shape, generator=generator).to(dtype).to(device)
    return [(layer[0].clone(), layer[1].clone()) for layer in numbers]


def clone(caches: KVCaches) -> Caches:
    return [(k_cache.clone(), v_cache.clone()) for k_cache, v_cache in caches]


def flat(caches: KVCaches) -> list[Tensor]:
    return list(chain.from_iterable(caches))


def same_bits(caches: KVCaches, others: KVCaches) -> bool:
    """Whether they are equal in every bit, NaN included."""
    pairs = zip(flat(caches), flat(others), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
