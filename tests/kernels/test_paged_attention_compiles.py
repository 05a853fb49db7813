"""The attention kernels compile for an H100 with the tiles that are chosen for each model."""

import re
from typing import Any

import pytest
import torch

from kernels.attention.schedule import Settings, Tiling, choose_tiling, choose_whole_tiling, padded
from kernels.attention.split import paged_attention_kernel
from kernels.attention.whole import prefill_attention_kernel
from tests.helpers.compile_sm90 import compile_for_sm90

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT_POINTERS = {"lse_ptr", "parts_ptr", "part_stats_ptr"}
MODEL_POINTERS = {"out_ptr", "q_ptr", "k_ptr", "v_ptr"}


def settings(dtype: str, head_dim: int, *, batch_invariant: bool = False) -> Settings:
    return Settings(
        head_dim=head_dim,
        element_size=DTYPES[dtype].itemsize,
        num_kv_heads=2,
        group=4,
        sliding_window=None,
        tree=False,
        batch_invariant=batch_invariant,
    )


def compile_kernel(
    kernel: Any, model: Settings, dtype: str, tiling: Tiling, *, is_fp8: bool = False, **choices: Any
) -> Any:
    """Compiles a kernel. choices: constexprs, and None for pointers that are left out."""
    constexprs = {
        "NUM_KV_HEADS": model.num_kv_heads,
        "GROUP": model.group,
        "HEAD_DIM": model.head_dim,
        "DIM": padded(model.head_dim),
        "BLOCK_SIZE": 16,
        "WINDOW": None,
        "ROWS": tiling.rows,
        "KEYS": tiling.keys,
        **({} if is_fp8 else dict.fromkeys(("k_scales_ptr", "v_scales_ptr"))),
        **choices,
    }
    signature = {name: _type(name, dtype) for name in kernel.arg_names if name not in constexprs}
    if is_fp8:
        signature |= {"k_ptr": "*fp8e4nv", "v_ptr": "*fp8e4nv"}
    return compile_for_sm90(
        kernel, signature, constexprs, num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=True
    )


def _type(name: str, dtype: str) -> str:
    if name in MODEL_POINTERS or name in FLOAT_POINTERS:
        return f"*{dtype if name in MODEL_POINTERS else 'fp32'}"
    if name == "ancestors_ptr":
        return "*i64"
    if name == "scale":
        return "fp32"
    if name.endswith("_scales_ptr"):
        return "*fp32"
    return "*i32" if name.endswith("_ptr") else "i32"


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_kernels_compile_for_every_dtype_and_head_size(dtype: str, head_dim: int) -> None:
    model = settings(dtype, head_dim)
    tiling = choose_tiling(model, num_rows=16)
    compiled = compile_kernel(paged_attention_kernel, model, dtype, tiling, lse_ptr=None, ancestors_ptr=None)
    # Two programs share a multiprocessor, and keys are copied without using registers while others are computed.
    assert 2 * compiled.metadata.shared < 227 << 10
    assert "cp.async" in compiled.asm["ptx"]
    assert ("mma.sync" in compiled.asm["ptx"]) == (dtype != "fp32")
    compile_kernel(
        prefill_attention_kernel,
        model,
        dtype,
        choose_whole_tiling(model),
        lse_ptr=None,
        ancestors_ptr=None,
        ONE_PASS=False,
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_compile_for_caches_in_fp8(dtype: str) -> None:
    """They read bytes, and multiply in the dtype of the queries."""
    model = settings(dtype, 128)
    choices = {"lse_ptr": None, "ancestors_ptr": None, "is_fp8": True}
    split = compile_kernel(paged_attention_kernel, model, dtype, choose_tiling(model, num_rows=16), **choices)
    whole = compile_kernel(
        prefill_attention_kernel, model, dtype, choose_whole_tiling(model), ONE_PASS=False, **choices
    )
    for compiled in (split, whole):
        assert "e4m3" in compiled.asm["ptx"]


def test_parts_are_visible_to_the_program_that_merges_them() -> None:
    """All threads write before one of them counts, with release and acquire; parts of others are read past the L1
    cache."""
    model = settings("bf16", 128)
    tiling = choose_tiling(model, num_rows=16)
    ptx = compile_kernel(paged_attention_kernel, model, "bf16", tiling, lse_ptr=None, ancestors_ptr=None).asm["ptx"]
    before, (count,), after = _around(ptx.splitlines(), r"atom\S*\.add")
    assert "atom.global.gpu.acq_rel.add" in count
    last_part = max(i for i, line in enumerate(before) if "st.global" in line)
    assert any("bar.sync" in line for line in before[last_part:])
    first_read = next(i for i, line in enumerate(after) if "ld.global" in line)
    assert "ld.global.cg" in after[first_read]
    assert any("bar.sync" in line for line in after[:first_read])


def _around(lines: list[str], pattern: str) -> tuple[list[str], list[str], list[str]]:
    (place,) = (i for i, line in enumerate(lines) if re.search(pattern, line))
    return lines[:place], lines[place : place + 1], lines[place + 1 :]


@pytest.mark.parametrize(("lse", "tree", "window"), [(True, True, None), (True, False, 4096), (False, True, 4096)])
def test_every_variant_compiles(lse: bool, tree: bool, window: int | None) -> None:
    options: dict[str, object] = {"WINDOW": window}
    options |= {} if lse else {"lse_ptr": None}
    options |= {} if tree else {"ancestors_ptr": None}
    model = settings("bf16", 128)
    compile_kernel(paged_attention_kernel, model, "bf16", choose_tiling(model, num_rows=64), **options)
    invariant = settings("bf16", 128, batch_invariant=True)
    tiling = choose_whole_tiling(invariant)
    compiled = compile_kernel(prefill_attention_kernel, invariant, "bf16", tiling, ONE_PASS=True, **options)
    assert "wgmma" in compiled.asm["ptx"]
    if not tree:
        compile_kernel(prefill_attention_kernel, model, "bf16", choose_whole_tiling(model), ONE_PASS=False, **options)
