"""Each copy kernel gives the bits of its reference."""

import pytest
import torch

from kernels.kv.block_copy import (
    cache_addresses,
    copy_blocks,
    copy_blocks_reference,
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)
from kernels.upcoming.move_slots import MOVES_AT_ONCE, move_slots, move_slots_reference
from tests.helpers.kv_caches import Caches, clone, random_caches, same_bits

# Slots of fewer words than a program takes, of as many, and of more; a block that is not a multiple of a tile.
SHAPES = [(1, 2), (2, 64), (3, 96)]  # num_kv_heads, head_dim


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def caches(request: pytest.FixtureRequest, dtype: torch.dtype, device: torch.device) -> Caches:
    num_kv_heads, head_dim = request.param
    made = random_caches(10, num_layers=2, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=device)
    made[0][0][3] = torch.nan  # copies keep bits, not just numbers
    return made


def test_copy_blocks(caches: Caches, device: torch.device) -> None:
    src, dst = (torch.tensor(ids, device=device) for ids in ([3, 5, 3], [0, 6, 1]))
    expected = clone(caches)
    copy_blocks_reference(expected, src, dst)
    copy_blocks(caches, src, dst, addresses=cache_addresses(caches))
    assert same_bits(caches, expected)


@pytest.mark.parametrize("num_moves", [1, MOVES_AT_ONCE, MOVES_AT_ONCE + 3])
def test_move_slots_that_overlap(num_moves: int, caches: Caches, device: torch.device) -> None:
    """Some moves write slots that earlier moves read, and some change nothing."""
    dst = torch.arange(1, 1 + num_moves, device=device)
    src = dst + torch.arange(num_moves, device=device) // 2 + 1
    src[num_moves // 2 :: 5] = -1
    src[0] = 2
    expected = clone(caches)
    move_slots_reference(expected, src, dst)
    move_slots(caches, src, dst)
    assert same_bits(caches, expected)


def test_gather_and_scatter(caches: Caches, device: torch.device) -> None:
    blocks = torch.tensor([6, 3, 0], device=device)
    shape = (3, 2, 2, *caches[0][0].shape[1:])
    expected, found = (torch.zeros(shape, dtype=caches[0][0].dtype, device=device) for _ in range(2))
    gather_blocks_reference(caches, blocks, expected)
    gather_blocks(caches, blocks, found)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    back = blocks.roll(1)
    theirs = clone(caches)
    scatter_blocks_reference(theirs, back, expected)
    scatter_blocks(caches, back, found)
    assert same_bits(caches, theirs)


def test_gather_into_rows_and_scatter_from_them(caches: Caches, device: torch.device) -> None:
    blocks, rows = torch.tensor([6, 3, 0], device=device), torch.tensor([4, 0, 2], device=device)
    shape = (5, 2, 2, *caches[0][0].shape[1:])
    expected, found = (torch.zeros(shape, dtype=caches[0][0].dtype, device=device) for _ in range(2))
    gather_blocks_reference(caches, blocks, expected, rows)
    gather_blocks(caches, blocks, found, rows=rows)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    theirs = clone(caches)
    scatter_blocks_reference(theirs, blocks.roll(1), expected, rows)
    scatter_blocks(caches, blocks.roll(1), found, rows=rows)
    assert same_bits(caches, theirs)


def test_one_layer_of_a_larger_buffer(caches: Caches, device: torch.device) -> None:
    blocks = torch.tensor([6, 2], device=device)
    shape = (5, 2, 4, 2, *caches[0][0].shape[1:])  # layers outside, blocks inside: both strided
    buffer = torch.zeros(shape, dtype=caches[0][0].dtype, device=device)[1:3].transpose(0, 1)[:, :, 0:1].squeeze(2)
    gather_blocks(caches[1:], blocks, buffer[:, 1:])
    assert not buffer[:, :1].any()
    assert same_bits([(buffer[:, 1, 0], buffer[:, 1, 1])], [(caches[1][0][blocks], caches[1][1][blocks])])


def test_no_blocks(caches: Caches, device: torch.device) -> None:
    none, before = torch.empty(0, dtype=torch.int64, device=device), clone(caches)
    copy_blocks(caches, none, none)
    move_slots(caches, none, none)
    gather_blocks(caches, none, torch.empty((0, 2, 2, *caches[0][0].shape[1:]), dtype=caches[0][0].dtype).to(device))
    assert same_bits(caches, before)
