"""RMSNorm, alone and fused with the residual addition (arXiv 1910.07467).

Each row is reduced on its own and in one fixed order, so its bits never depend on the rest of the batch. The shape of a
program depends on the length of a row alone.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.native import rows as native

TILE_ELEMENTS = 2048  # per program, at least: short rows, such as heads, come several at a time
_ELEMENTS_PER_WARP = 1024  # 32 per lane: four 16-byte loads in flight in 16-bit types
_MAX_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,  # None: normalise x itself
    weight_ptr,
    out_ptr,  # [num_rows, HIDDEN], contiguous
    num_rows,
    num_inner,  # row = outer * num_inner + inner
    x_stride_outer,
    x_stride_inner,
    x_stride,
    residual_stride_outer,
    residual_stride_inner,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < HIDDEN)
    outer, inner = (row // num_inner).to(tl.int64), (row % num_inner).to(tl.int64)
    offsets = outer * x_stride_outer + inner * x_stride_inner + column * x_stride
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        offsets = outer * residual_stride_outer + inner * residual_stride_inner + column * residual_stride
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + offsets, x, mask=mask)
    x = x.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / HIDDEN
    y = x * tl.rsqrt(mean_square + eps)[:, None] * weight
    tl.store(out_ptr + row.to(tl.int64) * HIDDEN + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; fp32 inside, rounded once to x.dtype.

    x: [..., hidden] with up to two leading dimensions, any strides; weight: contiguous [hidden]. Also serves per-head
    norms: hidden is then head_dim. Returns a contiguous tensor like x. Raises ValueError where weight does not fit x.
    """
    _check(x, weight)
    if runs_triton(x):
        return _launch(x, None, weight, eps)
    return _on_cpu(x, None, weight, eps)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to residual IN PLACE and return (rms_norm(residual), residual).

    The sum is rounded to the model dtype before it is normalised, as if the two steps were separate.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: expected {list(x.shape)} {x.dtype} like x, got {list(residual.shape)} {residual.dtype}"
        )
    if runs_triton(x):
        return _launch(x, residual, weight, eps), residual
    return _on_cpu(x, residual, weight, eps), residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32."""
    x_fp32 = x.float()
    mean_square = x_fp32.square().mean(dim=-1, keepdim=True)
    return (x_fp32 * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)


def tile_shape(hidden: int) -> tuple[int, int, int]:
    """(rows per program, columns of its tile, warps). Depends on the row length alone, so the batch changes no bits.

    The columns are a power of two, at least `hidden`.
    """
    block = triton.next_power_of_2(hidden)
    rows = max(1, TILE_ELEMENTS // block)
    return rows, block, min(_MAX_WARPS, rows * block // _ELEMENTS_PER_WARP)


def _on_cpu(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """By kernels/native where it can, otherwise with the bits of the reference."""
    if native.can_compute(x, weight) and (residual is None or residual.stride(-1) == 1):
        return native.native_rms_norm(x, residual, weight, eps)
    total = x if residual is None else residual.add_(x)
    return F.rms_norm(total, weight.shape, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x_rows = _as_3d(x)
    residual_rows = x_rows if residual is None else _as_3d(residual)
    num_rows = x_rows.shape[0] * x_rows.shape[1]
    hidden = x.shape[-1]
    rows, block, num_warps = tile_shape(hidden)
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        residual,
        weight,
        out,
        num_rows,
        x_rows.shape[1],
        *x_rows.stride(),
        *residual_rows.stride(),
        eps,
        HIDDEN=hidden,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,  # so that bits do not depend on how a launch specialises on strides
    )
    return out


def _as_3d(x: Tensor) -> Tensor:
    """View [..., hidden] as [outer, inner, hidden] in the same memory."""
    if x.ndim == 3:
        return x
    return x.view(1, 1, -1) if x.ndim == 1 else x.unsqueeze(1)


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if not 1 <= x.ndim <= 3:
        raise ValueError(f"x: expected [..., hidden] with up to two leading dimensions, got {list(x.shape)}")
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight: expected [hidden] for x {list(x.shape)}, got {list(weight.shape)}")
    if weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight: expected contiguous {x.dtype} like x, got {weight.dtype} with strides {list(weight.stride())}"
        )
