"""The definitions of the copies, against plain loops; and what the launchers refuse."""

import pytest
import torch
from torch import Tensor

from kernels.block_copy import KVCaches, cache_addresses, copy_blocks
from tests.helpers.compile_sm90 import compile_for_sm90

Caches = list[tuple[Tensor, Tensor]]


def numbered_caches(num_layers: int = 3, num_blocks: int = 6, block_size: int = 4) -> Caches:
    """Every number in them is another."""
    shape = (num_layers, 2, num_blocks, block_size, 2, 8)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return [(layer[0].clone(), layer[1].clone()) for layer in numbers]


def flat(caches: KVCaches) -> list[Tensor]:
    return [cache for layer in caches for cache in layer]


def test_blocks_are_copied_in_all_layers_and_nothing_else_changes() -> None:
    caches, before = numbered_caches(), numbered_caches()
    copy_blocks(caches, torch.tensor([4, 0, 4]), torch.tensor([1, 2, 5]))
    for after, old in zip(flat(caches), flat(before), strict=True):
        expected = [old[0], old[4], old[0], old[3], old[4], old[4]]
        assert torch.equal(after, torch.stack(expected))


def test_no_copy_is_no_change() -> None:
    caches, none = numbered_caches(), torch.empty(0, dtype=torch.int64)
    copy_blocks(caches, none, none)
    assert all(torch.equal(a, b) for a, b in zip(flat(caches), flat(numbered_caches()), strict=True))


def test_what_does_not_fit_is_named() -> None:
    caches, blocks = numbered_caches(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="dst_blocks: expected \\[2\\]"):
        copy_blocks(caches, blocks, torch.tensor([2]))
    with pytest.raises(ValueError, match="src_blocks: expected contiguous int64"):
        copy_blocks(caches, blocks.int(), blocks)
    with pytest.raises(ValueError, match="v of layer 1"):
        copy_blocks([caches[0], (caches[1][0], caches[1][1].half())], blocks, blocks + 2)
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        cache_addresses([(torch.zeros(1, 1, 1, 3).half(), torch.zeros(1, 1, 1, 3).half())])


def test_copies_compile_for_sm_90_into_wide_accesses() -> None:
    from kernels.block_copy import TILE_WORDS, _copy_blocks_kernel

    types = {"table_ptr": "*i64", "src_ptr": "*i64", "dst_ptr": "*i64", "block_words": "i32:16"}
    compiled = compile_for_sm90(_copy_blocks_kernel, types, {"TILE": TILE_WORDS})
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
