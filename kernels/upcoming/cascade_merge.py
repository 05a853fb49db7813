"""Joins attention over two sets of keys into attention over both.

With o_i the softmax-weighted mean of the values of part i and lse_i the natural logarithm of its softmax's sum,

    M = max(lse_1, lse_2)    w_i = exp(lse_i - M)    o = (w_1 o_1 + w_2 o_2) / (w_1 + w_2)    lse = M + log(w_1 + w_2)

is exact, associative and commutative (Hydragen, arXiv 2402.05099), so keys may be split in any way and parts joined in
any order. Libraries differ in the base of the logarithm: here it is e.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton

TILE_ELEMENTS = 2048

Partial = tuple[Tensor, Tensor]  # o [num_tokens, num_heads, head_dim], lse fp32 [num_tokens, num_heads]


@triton.jit(do_not_specialize=["num_rows"])
def cascade_merge_kernel(
    o1_ptr,
    lse1_ptr,
    o2_ptr,
    lse2_ptr,
    o_ptr,
    lse_ptr,
    num_rows,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    lse1 = tl.load(lse1_ptr + row, mask=row < num_rows, other=float("-inf"))
    lse2 = tl.load(lse2_ptr + row, mask=row < num_rows, other=float("-inf"))
    greater = tl.maximum(lse1, lse2)
    some = greater > float("-inf")
    shift = tl.where(some, greater, 0.0)  # -inf - -inf is NaN
    w1, w2 = tl.exp(lse1 - shift), tl.exp(lse2 - shift)
    total = tl.where(some, w1 + w2, 1.0)
    offset = row[:, None].to(tl.int64) * HEAD_DIM + dim[None, :]
    mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    # A part without keys is not read: its o may hold anything.
    o1 = tl.load(o1_ptr + offset, mask=mask & (w1 > 0)[:, None], other=0.0).to(tl.float32)
    o2 = tl.load(o2_ptr + offset, mask=mask & (w2 > 0)[:, None], other=0.0).to(tl.float32)
    o = (w1[:, None] * o1 + w2[:, None] * o2) / total[:, None]
    tl.store(o_ptr + offset, o.to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, tl.where(some, shift + tl.log(total), float("-inf")), mask=row < num_rows)


def cascade_merge(first: Partial, second: Partial, *, out: Tensor | None = None) -> Partial:
    """Attention over the keys of both parts, from the attention over each.

    first, second: contiguous o [num_tokens, num_heads, head_dim] and natural lse, fp32 [num_tokens, num_heads]. A part
    without keys has lse -inf, whatever its o holds. A row without any keys gets o = 0 and lse -inf. Everything is
    computed in fp32 and rounded once to the dtype of the o's, so fp32 partials lose nothing on the way. out: where o
    goes, possibly one of the parts; without it a new tensor.

    Returns (o, lse). The bits do not depend on which part comes first. Raises ValueError naming the argument that does
    not fit.
    """
    _check(first, second, out)
    (o1, lse1), (o2, lse2) = first, second
    if not runs_triton(o1):
        o, lse = cascade_merge_reference(first, second)
        return (o, lse) if out is None else (out.copy_(o), lse)
    o = torch.empty_like(o1) if out is None else out
    lse = torch.empty_like(lse1)
    head_dim = o1.shape[2]
    if o.numel():
        dim = triton.next_power_of_2(head_dim)
        rows = max(1, TILE_ELEMENTS // dim)
        cascade_merge_kernel[(triton.cdiv(lse.numel(), rows),)](
            o1,
            lse1,
            o2,
            lse2,
            o,
            lse,
            lse.numel(),
            HEAD_DIM=head_dim,
            ROWS=rows,
            DIM=dim,
            enable_fp_fusion=False,  # a fused product would treat the two parts differently
        )
    return o, lse


def cascade_merge_reference(first: Partial, second: Partial) -> Partial:
    """The definition."""
    (o1, lse1), (o2, lse2) = first, second
    greater = torch.maximum(lse1, lse2)
    shift = greater.nan_to_num(neginf=0.0)
    w1, w2 = torch.exp(lse1 - shift).unsqueeze(2), torch.exp(lse2 - shift).unsqueeze(2)
    total = (w1 + w2).masked_fill(greater.isneginf().unsqueeze(2), 1.0)
    o = (w1 * o1.float().masked_fill(w1 == 0, 0.0) + w2 * o2.float().masked_fill(w2 == 0, 0.0)) / total
    return o.to(o1.dtype), greater + total.squeeze(2).log()


def _check(first: Partial, second: Partial, out: Tensor | None) -> None:
    o1 = first[0]
    if o1.ndim != 3 or not o1.is_floating_point():
        raise ValueError(f"first: expected floating [num_tokens, num_heads, head_dim], got {o1.dtype} {list(o1.shape)}")
    for name, (o, lse) in (("first", first), ("second", second)):
        if o.shape != o1.shape or o.dtype != o1.dtype or not o.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous o {list(o1.shape)} {o1.dtype}, got {list(o.shape)} {o.dtype} with "
                f"strides {list(o.stride())}"
            )
        if lse.shape != o1.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous fp32 lse {list(o1.shape[:2])}, got {lse.dtype} {list(lse.shape)}"
            )
    if out is not None and (out.shape != o1.shape or out.dtype != o1.dtype or not out.is_contiguous()):
        raise ValueError(f"out: expected contiguous {list(o1.shape)} {o1.dtype}, got {list(out.shape)} {out.dtype}")
