"""The gate of a SwiGLU MLP: silu(gate) * up (arXiv 2002.05202)."""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.native import rows as native

TILE_ELEMENTS = 2048  # results of a program: each lane has two 16-byte loads of each half in flight, in 16-bit types
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,  # [num_rows, intermediate], contiguous
    num_rows,
    intermediate,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_column_blocks = tl.cdiv(intermediate, BLOCK)
    row = (tl.program_id(0) // num_column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % num_column_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < intermediate)
    offsets = row * row_stride + column * column_stride
    gate = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + intermediate * column_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * intermediate + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate].

    Rows may be strided. An element's bits depend only on its own gate and up, not on its place in the batch.
    Raises ValueError unless gate_up is two-dimensional, floating, and even in its last dimension.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected [num_tokens, 2 * intermediate], got {list(gate_up.shape)}")
    if not gate_up.is_floating_point():
        raise ValueError(f"gate_up: expected a floating dtype, got {gate_up.dtype}")
    if runs_triton(gate_up):
        return _launch(gate_up)
    return native.native_silu_and_mul(gate_up) if native.can_compute(gate_up) else silu_and_mul_cpu(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The definition, in fp32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def silu_and_mul_cpu(gate_up: Tensor) -> Tensor:
    """For where kernels/native cannot. Uses the fewest torch calls whose vectorised body and scalar tail round alike.

    Where a tail begins depends on the number of rows and threads. In 16-bit types, F.silu rounds every input alike in
    both (tests try all 65,536). In fp32 it does not, so the quotient is computed with operators that do.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype != torch.float32:
        return F.silu(gate).mul_(up)
    denominator = torch.exp(gate.neg()).add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up)


def _launch(gate_up: Tensor) -> Tensor:
    num_rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block = min(TILE_ELEMENTS, triton.next_power_of_2(intermediate))
    rows = TILE_ELEMENTS // block
    grid = (triton.cdiv(num_rows, rows) * triton.cdiv(intermediate, block),)
    silu_and_mul_kernel[grid](
        gate_up,
        out,
        num_rows,
        intermediate,
        *gate_up.stride(),
        ROWS=rows,
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
