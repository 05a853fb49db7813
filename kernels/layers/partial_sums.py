"""Adds the partial sums of a product that was split along its inputs, in order."""

import triton
from torch import Tensor
from triton import language as tl

MERGE_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_splits", "num_elements"])
def add_partial_sums_kernel(
    partial_ptr,  # fp32 [num_splits, num_rows, out_features]
    bias_ptr,
    out_ptr,  # [num_rows, out_features]
    num_splits,
    num_elements,  # num_rows * out_features
    out_features,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < num_elements
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(num_splits):
        total += tl.load(partial_ptr + element, mask, other=0.0)
        partial_ptr += num_elements
    if bias_ptr is not None:
        total += tl.load(bias_ptr + element % out_features, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask)


def add_partial_sums(sums: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Add fp32 [num_splits, num_rows, out_features] in order, then the bias, into `out`, and return it. For kernels."""
    grid = (triton.cdiv(out.numel(), MERGE_ELEMENTS),)
    add_partial_sums_kernel[grid](sums, bias, out, sums.shape[0], out.numel(), out.shape[1], BLOCK=MERGE_ELEMENTS)
    return out
