"""The references of the copies, compared with plain loops, and what the launchers refuse."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv import block_copy
from kernels.kv.block_copy import (
    cache_addresses,
    copy_blocks,
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)
from kernels.upcoming import move_slots as slot_moves
from kernels.upcoming.move_slots import move_slots
from tests.helpers.compile_sm90 import compile_for_sm90
from tests.helpers.kv_caches import clone, flat, random_caches, same_bits

NONE = torch.empty(0, dtype=torch.int64)


def test_blocks_are_copied_in_all_layers_and_nothing_else_changes() -> None:
    caches = random_caches(6)
    before = clone(caches)
    copy_blocks(caches, torch.tensor([4, 0, 4]), torch.tensor([1, 2, 5]))
    for after, old in zip(flat(caches), flat(before), strict=True):
        assert torch.equal(after, torch.stack([old[0], old[4], old[0], old[3], old[4], old[4]]))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_moves_of_tree_nodes_equal_moves_done_one_by_one(data: st.DataObject) -> None:
    """The moves pack an accepted path through a tree in level order: node ids grow, and each is at least its depth."""
    num_nodes = data.draw(st.integers(1, 11))
    path = sorted(data.draw(st.sets(st.integers(1, num_nodes))))
    first = data.draw(st.integers(0, 3))
    src, dst = [first + node for node in path], [first + 1 + depth for depth in range(len(path))]
    caches = random_caches(4)
    expected = clone(caches)
    for cache in flat(expected):
        slots = cache.view(16, 2, 8)
        for source, destination in zip(src, dst, strict=True):
            slots[destination] = slots[source]
    move_slots(caches, torch.tensor(src, dtype=torch.int64), torch.tensor(dst, dtype=torch.int64))
    assert same_bits(caches, expected)


def test_a_source_of_minus_one_moves_nothing() -> None:
    caches = random_caches(3)
    before = clone(caches)
    move_slots(caches, torch.tensor([-1, 7, -1]), torch.tensor([3, 2, -1]))
    for after, old in zip(flat(caches), flat(before), strict=True):
        expected = old.clone().view(12, 2, 8)
        expected[2] = expected[7]
        assert torch.equal(after.view(12, 2, 8), expected)


@pytest.mark.usefixtures("implementation")
def test_blocks_return_from_staging_to_any_place() -> None:
    caches = random_caches(6)
    staging = torch.empty(3, 3, 2, 4, 2, 8)
    gather_blocks(caches, torch.tensor([5, 0, 3]), staging)
    assert torch.equal(staging[2, 1, 0], caches[1][0][3])  # third block, layer 1, keys
    assert torch.equal(staging[0, 2, 1], caches[2][1][5])
    elsewhere = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in caches]
    scatter_blocks(elsewhere, torch.tensor([2, 4, 1]), staging)
    for there, here in zip(flat(elsewhere), flat(caches), strict=True):
        nothing = torch.zeros_like(here[0])
        assert torch.equal(there, torch.stack([nothing, here[3], here[5], nothing, here[0], nothing]))


@pytest.mark.usefixtures("implementation")
def test_blocks_go_to_the_given_rows_and_come_back_from_them() -> None:
    caches, elsewhere = random_caches(6), random_caches(6)
    staging = torch.full((5, 3, 2, 4, 2, 8), torch.nan)
    gather_blocks(caches, torch.tensor([5, 0, 3]), staging, rows=torch.tensor([4, 1, 2]))
    assert torch.equal(staging[2, 1, 0], caches[1][0][3])
    assert torch.equal(staging[4, 2, 1], caches[2][1][5])
    assert staging[[0, 3]].isnan().all()
    scatter_blocks(elsewhere, torch.tensor([0, 2]), staging, rows=torch.tensor([4, 2]))
    for there, here in zip(flat(elsewhere), flat(caches), strict=True):
        assert torch.equal(there, torch.stack([here[5], here[1], here[3], *here[3:]]))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    ("block_size", "num_kv_heads", "head_dim", "dtype"),
    [
        (1, 1, 1, torch.float32),  # 4 bytes: no vector
        (3, 1, 10, torch.float16),  # 60 bytes: most pieces do not lie at multiples of a vector
        (4, 1, 24, torch.bfloat16),  # 192 bytes: lines alone
        (5, 3, 8, torch.float32),  # 480 bytes: lines and a rest
        (16, 8, 128, torch.bfloat16),  # 32 KiB
    ],
)
def test_blocks_of_any_size_are_staged_bit_for_bit(
    block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    shape = {"block_size": block_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    caches = random_caches(7, num_layers=2, dtype=dtype, **shape)
    caches[0][1][3] = torch.nan
    blocks, rows = torch.tensor([6, 3, 0]), torch.tensor([1, 3, 0])
    staging, expected = (torch.zeros(4, 2, 2, *shape.values(), dtype=dtype) for _ in range(2))
    gather_blocks(caches, blocks, staging, rows=rows)
    gather_blocks_reference(caches, blocks, expected, rows)
    assert torch.equal(staging.view(torch.uint8), expected.view(torch.uint8))
    theirs, ours = clone(caches), clone(caches)
    scatter_blocks(ours, blocks.roll(1), staging, rows=rows)
    scatter_blocks_reference(theirs, blocks.roll(1), expected, rows)
    assert same_bits(ours, theirs)


@pytest.mark.usefixtures("implementation")
def test_one_layer_can_be_staged_in_a_buffer_for_all() -> None:
    caches = random_caches(6)
    staging = torch.full((2, 3, 2, 4, 2, 8), torch.nan)
    gather_blocks(caches[1:2], torch.tensor([5, 0]), staging[:, 1:2])
    assert torch.equal(staging[:, 1, 0], caches[1][0][[5, 0]])
    assert staging[:, [0, 2]].isnan().all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("block", "row"), [(6, 0), (-1, 0), (0, 2), (0, -1)])
def test_staging_touches_no_memory_outside_of_its_arguments(block: int, row: int) -> None:
    """Addresses are computed from them, so the compiled copy would."""
    caches, staging = random_caches(6), torch.empty(2, 3, 2, 4, 2, 8)
    for copy in (gather_blocks, scatter_blocks):
        with pytest.raises(ValueError, match=r"(block_ids: expected 0 to 5|rows: expected 0 to 1), got (6|2|-1)"):
            copy(caches, torch.tensor([0, block]), staging, rows=torch.tensor([1, row]))


def test_copying_nothing_changes_nothing() -> None:
    caches = random_caches(3)
    before = clone(caches)
    copy_blocks(caches, NONE, NONE)
    move_slots(caches, NONE, NONE)
    gather_blocks(caches, NONE, torch.empty(0, 3, 2, 4, 2, 8))
    scatter_blocks(caches, NONE, torch.empty(0, 3, 2, 4, 2, 8))
    assert same_bits(caches, before)


def test_bad_arguments_are_named() -> None:
    caches, blocks = random_caches(6), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"dst_blocks: expected \[2\]"):
        copy_blocks(caches, blocks, torch.tensor([2]))
    with pytest.raises(ValueError, match="src_slots: expected contiguous int64"):
        move_slots(caches, blocks.int(), blocks)
    with pytest.raises(ValueError, match="v of layer 1"):
        copy_blocks([caches[0], (caches[1][0], caches[1][1].half())], blocks, blocks + 2)
    with pytest.raises(ValueError, match="kv_caches: expected at least one layer"):
        copy_blocks([], blocks, blocks + 2)
    with pytest.raises(ValueError, match="kv_caches: expected at least one layer"):
        gather_blocks([], blocks, torch.empty(2, 0, 2, 4, 2, 8))
    with pytest.raises(ValueError, match=r"staging: expected \[2, 3, 2, 4, 2, 8\]"):
        gather_blocks(caches, blocks, torch.empty(2, 2, 2, 4, 2, 8))
    with pytest.raises(ValueError, match=r"rows: expected \[2\] like block_ids, got \[1\]"):
        gather_blocks(caches, blocks, torch.empty(2, 3, 2, 4, 2, 8), rows=torch.tensor([0]))
    with pytest.raises(ValueError, match="in one piece"):
        gather_blocks(caches, blocks, torch.empty(2, 3, 2, 4, 8, 2).transpose(-1, -2))
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        cache_addresses(random_caches(1, num_kv_heads=1, head_dim=3, dtype=torch.float16))
    shifted = torch.zeros(2, 257)[:, 1:].unbind()
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        cache_addresses([tuple(cache.view(4, 4, 2, 8) for cache in shifted)])


@pytest.mark.parametrize(
    ("kernel", "types", "constexprs"),
    [
        (
            block_copy.copy_blocks_kernel,
            {"src_ptr": "*i64", "dst_ptr": "*i64", "block_words": "i32:16"},
            {"TILE": block_copy.TILE_WORDS},
        ),
        (
            slot_moves.move_slots_kernel,
            {"src_ptr": "*i64", "dst_ptr": "*i64", "num_moves": "i32", "slot_words": "i32:16"},
            {"MOVES": slot_moves.MOVES_AT_ONCE, "TILE": slot_moves.MOVE_TILE_WORDS},
        ),
        *(
            (
                block_copy.stage_blocks_kernel,
                {
                    "block_ptr": "*i64",
                    "row_ptr": "*i64",
                    "staging_ptr": "*bf16",
                    "row_stride": "i32:16",
                    "layer_stride": "i32:16",
                    "block_words": "i32:16",
                },
                {"GATHER": gather, "HAS_ROWS": has_rows, "TILE": block_copy.TILE_WORDS},
            )
            for gather in (True, False)
            for has_rows in (True, False)
        ),
    ],
)
def test_kernels_compile_for_sm_90_into_wide_accesses(
    kernel: Any, types: dict[str, str], constexprs: dict[str, object]
) -> None:
    ptx = compile_for_sm90(kernel, {"table_ptr": "*i64", **types}, constexprs).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
