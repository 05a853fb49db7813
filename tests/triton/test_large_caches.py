"""Caches of more than 2^31 elements, whose offsets do not fit into 32 bits. Memory that nobody touches takes no
room."""

import pytest
import torch
from torch import Tensor

from kernels.attention.paged_attention import paged_attention, paged_attention_reference
from kernels.kv.block_copy import copy_blocks, gather_blocks
from kernels.kv.reshape_and_cache import gather_rotary, reshape_and_cache
from kernels.upcoming.chunk_bounds import chunk_bounds
from kernels.upcoming.move_slots import move_slots

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = (1 << 17) + 8, 16, 8, 128  # 2^31 elements, and some blocks
FAR = [NUM_BLOCKS - 1, NUM_BLOCKS - 4]
NEAR = [1, 2]


@pytest.fixture
def caches(device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values in which a few blocks near the start and near the end are filled."""
    torch.manual_seed(0)
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
    assert k_cache.numel() > 2**31
    for block in FAR + NEAR:
        k_cache[block], v_cache[block] = torch.randn(2, *shape[1:]).to(k_cache)
    return k_cache, v_cache


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_attention(caches: tuple[Tensor, Tensor], batch_invariant: bool, device: torch.device) -> None:
    q = torch.randn(2, NUM_KV_HEADS, HEAD_DIM).to(caches[0])
    table, lens, bounds = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([FAR], [30], [0, 2]))
    found = paged_attention(q, *caches, table, lens, bounds, softmax_scale=0.1, batch_invariant=batch_invariant)
    expected, _ = paged_attention_reference(q, *caches, table, lens, bounds, softmax_scale=0.1)
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2**-9)


def test_writing(caches: tuple[Tensor, Tensor], device: torch.device) -> None:
    q, k, v = torch.randn(3, 1, NUM_KV_HEADS, HEAD_DIM).to(caches[0]).unbind()
    unrotated = gather_rotary(
        torch.tensor([[1.0, 0.0]], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    )
    slot = torch.tensor([FAR[0] * BLOCK_SIZE + 5], device=device)
    reshape_and_cache(q, k, v, unrotated, slot, *caches)
    assert torch.equal(caches[0][FAR[0], 5], k[0])
    assert torch.equal(caches[1][FAR[0], 5], v[0])


def test_copies(caches: tuple[Tensor, Tensor], device: torch.device) -> None:
    near, far = torch.tensor(NEAR, device=device), torch.tensor(FAR, device=device)
    staging = torch.empty(2, 1, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float16, device=device)
    gather_blocks([caches], far, staging)
    for part, cache in enumerate(caches):
        assert torch.equal(staging[:, 0, part], cache[far])
    copy_blocks([caches], near, far)
    move_slots([caches], near * BLOCK_SIZE + 1, far * BLOCK_SIZE + 3)
    for cache in caches:
        assert torch.equal(cache[far, 4:], cache[near, 4:])
        assert torch.equal(cache[far, 3], cache[near, 1])


def test_bounds(caches: tuple[Tensor, Tensor], device: torch.device) -> None:
    table, lens = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([FAR], [32]))
    found = chunk_bounds(caches[0], table, lens, chunk_size=BLOCK_SIZE)
    assert torch.equal(found[0], torch.stack(caches[0][FAR].aminmax(dim=1), dim=1))
