"""The sampling kernels compile for an H100, and no multiply is fused with an add where bits matter."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from kernels.sampling.gumbel import EXACT
from kernels.sampling.non_finite import non_finite_kernel
from kernels.sampling.penalties import BIAS, MASK, PENALISE, edit_kernel
from kernels.sampling.probability_mass import mass_and_rank_kernel
from kernels.sampling.sample import best_tile_kernel, sample_tiles_kernel
from kernels.sampling.softmax_sum import row_sums_kernel, tile_sums_kernel
from kernels.sampling.tile import NUM_WARPS, SMALL_TILE, TILE
from kernels.sampling.token_bits import token_bits_kernel
from kernels.sampling.top_keys import top_of_rows_kernel, top_of_tiles_kernel
from kernels.sampling.truncation_threshold import (
    collect_kernel,
    lower_bound_kernel,
    part_maxima_kernel,
    threshold_kernel,
)
from kernels.sampling.verify_chain import verify_chain_kernel
from tests.helpers.compile_sm90 import compile_for_sm90

INT64 = {
    "best_ptr",
    "seeds_ptr",
    "sample_indices_ptr",
    "positions_ptr",
    "token_ids_ptr",
    "top_ptr",
    "tile_top_ptr",
    "sums_ptr",
    "counts_ptr",
    "totals_ptr",
    "top_k_ptr",
    "rows_ptr",
    "num_accepted_ptr",
    "next_token_ids_ptr",
    "target_token_ids_ptr",
    "draft_token_ids_ptr",
    "cu_rows_ptr",
}
OTHER = {"top_p_ptr": "*fp64", "bits_ptr": "*i32", "found_ptr": "*u8", "seen_ptr": "*i1"}
FUSED = re.compile(r"\bfma\.rn\.f32\b")
# Divisions that are not rounded correctly, and arithmetic that flushes tiny numbers to zero. (A floor may do so: it
# only gets numbers of 2^-26 and more.)
INEXACT = re.compile(r"\bdiv\.full|\b(add|sub|mul|div)\.[.\w]*ftz")


def compile_kernel(kernel: Any, constexprs: Mapping[str, object], num_warps: int = 4, **options: object) -> str:
    """Returns the PTX. Pointers that constexprs do not leave out have the types that their names have in this
    folder."""
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_ptr"):
            signature[name] = OTHER.get(name, "*i64" if name in INT64 else "*fp32")
        else:
            signature[name] = "i32"
    if kernel is row_sums_kernel:
        signature["totals_ptr"] = "*fp32"
    ptx: str = compile_for_sm90(kernel, signature, constexprs, num_warps=num_warps, **options).asm["ptx"]
    return ptx


NO_NOISE = dict.fromkeys(
    ("temperature_ptr", "thresholds_ptr", "seeds_ptr", "sample_indices_ptr", "positions_ptr"), None
)
EXACT_KERNELS = [
    (sample_tiles_kernel, {"HAS_THRESHOLDS": True, "TILE": TILE}, NUM_WARPS[TILE]),
    (sample_tiles_kernel, {"HAS_THRESHOLDS": False, "TILE": SMALL_TILE}, NUM_WARPS[SMALL_TILE]),
    (top_of_tiles_kernel, {"HAS_NOISE": True, "HAS_THRESHOLDS": True, "TILE": TILE}, NUM_WARPS[TILE]),
    (top_of_tiles_kernel, {**NO_NOISE, "HAS_NOISE": False, "HAS_THRESHOLDS": False, "TILE": SMALL_TILE}, 4),
    (mass_and_rank_kernel, {"HAS_THRESHOLDS": True, "TILE": TILE}, NUM_WARPS[TILE]),
    (collect_kernel, {"TILE": TILE}, 8),
    (threshold_kernel, {"BLOCK": 2048}, 8),
    (edit_kernel, {"EDIT": PENALISE, "BLOCK": 256}, 4),
]
OTHER_KERNELS = [
    (best_tile_kernel, {"BLOCK": 128}, 4),
    (top_of_rows_kernel, {"BLOCK": 4096}, 16),
    (non_finite_kernel, {"TILE": TILE}, 8),
    (tile_sums_kernel, {"TILE": TILE}, 8),
    (row_sums_kernel, {"BLOCK": 32}, 4),
    (part_maxima_kernel, {"TILE": TILE, "PART": 128}, 8),
    (lower_bound_kernel, {"BLOCK": 1024}, 4),
    (verify_chain_kernel, {"BLOCK": 32}, 1),
    (token_bits_kernel, {"BLOCK": 1024}, 4),
    (edit_kernel, {"EDIT": BIAS, "BLOCK": 256, "seen_ptr": None, "settings_ptr": None}, 4),
    (edit_kernel, {"EDIT": MASK, "BLOCK": 256, "seen_ptr": None, "settings_ptr": None, "amounts_ptr": None}, 4),
]


@pytest.mark.parametrize(("kernel", "constexprs", "num_warps"), EXACT_KERNELS)
def test_bits_are_left_alone(kernel: Any, constexprs: dict[str, object], num_warps: int) -> None:
    ptx = compile_kernel(kernel, constexprs, num_warps, **EXACT)
    assert not FUSED.search(ptx)
    assert not INEXACT.search(ptx)


def test_without_the_option_operations_would_be_fused() -> None:
    constexprs = {"HAS_THRESHOLDS": False, "TILE": SMALL_TILE}
    assert FUSED.search(compile_kernel(sample_tiles_kernel, constexprs, enable_fp_fusion=True))


@pytest.mark.parametrize(("kernel", "constexprs", "num_warps"), OTHER_KERNELS)
def test_all_other_kernels_compile(kernel: Any, constexprs: dict[str, object], num_warps: int) -> None:
    compile_kernel(kernel, constexprs, num_warps)
