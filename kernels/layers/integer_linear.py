"""Products of a few rows with a weight in int4 or int8, whose scales belong to groups of neighbouring inputs.

A tile lies within one group. So codes less their zero point, which are small integers and exact in every dtype, go
through the tensor cores as they are, and one factor for each output scales a tile's sums. W4A16 and W8A16 of
compressed-tensors, GPTQ and AWQ (arXiv 2210.17323, 2306.00978) are such weights.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.interpreter_numpy import accept_loop_bounds
from kernels.layers.mxfp4_linear import split_features
from kernels.layers.partial_sums import add_partial_sums

accept_loop_bounds()

MAX_KERNEL_ROWS = 64  # as in mxfp4_linear; not measured
_INT4_OFFSET = tl.constexpr(8)  # of a stored code


@triton.jit(do_not_specialize=["num_rows"])
def integer_linear_kernel(
    x_ptr,  # [num_rows, in_features], rows may be strided
    code_ptr,  # int8 [out_features, in_features], or uint8 [.., in_features / 2, rounded up]
    scale_ptr,  # fp32 [out_features, num_groups]
    zero_ptr,  # like scales, or None
    sum_ptr,  # fp32 [num_splits, num_rows, out_features]
    num_rows,
    out_features,
    in_features,
    num_groups,
    group_size,  # BLOCK_IN divides it, or there is one group
    x_stride,
    split_features,  # inputs of one program; BLOCK_IN divides it
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CODES_IN_BYTE: tl.constexpr = 8 // BITS
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]
    feature = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = row < num_rows
    feature = tl.minimum(feature, out_features - 1).to(
        tl.int64
    )  # outputs beyond are the last one again, and not stored
    num_bytes = tl.cdiv(in_features, CODES_IN_BYTE)
    code_ptrs = code_ptr + feature[:, None] * num_bytes
    begin = tl.program_id(1) * split_features
    total = tl.zeros([ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + split_features, in_features), BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)[None, :]
        byte = start // CODES_IN_BYTE + tl.arange(0, BLOCK_IN // CODES_IN_BYTE)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64) * x_stride + column, row_mask & (column < in_features), other=0.0)
        codes = tl.load(code_ptrs + byte, byte < num_bytes, other=0)
        if BITS == 4:
            halves = tl.join(codes & 15, codes >> 4).reshape(BLOCK_OUT, BLOCK_IN)
            numbers = halves.to(tl.float32) - _INT4_OFFSET
        else:
            numbers = codes.to(tl.float32)
        group = feature * num_groups + start // group_size
        if zero_ptr is not None:
            numbers -= tl.load(zero_ptr + group)[:, None]
        partial = tl.dot(x, numbers.to(dtype).T, input_precision="ieee")
        total += partial * tl.load(scale_ptr + group)[None, :]
    out_feature = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    offsets = (tl.program_id(1).to(tl.int64) * num_rows + row) * out_features + out_feature
    tl.store(sum_ptr + offsets, total, row_mask & (out_feature < out_features))


def takes_groups_of(group_size: int, in_features: int) -> bool:
    """Whether the kernel has tiles for groups of so many inputs."""
    return group_size >= in_features or group_size % 16 == 0


def integer_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    num_bits: int,
    group_size: int,
) -> Tensor:
    """x @ weight^T + bias with weight = scale * (code - zero), sums in fp32, rounded once. For Triton.

    x: bf16, fp16 or fp32 [num_rows, in_features]; codes: int8 [out_features, in_features], or 4 bits each as in
    `kernels.layers.quantized`; scales, zeros: fp32 [out_features, num_groups]; bias: [out_features]. Zero points are
    whole numbers, at most 256 away from every code. Made for 1 to 64 rows. Returns [num_rows, out_features] like x.
    Raises ValueError naming the argument that does not fit.
    """
    num_rows, in_features = x.shape
    out_features, num_groups = scales.shape
    _check(x, codes, scales, zeros, num_bits=num_bits, group_size=group_size)
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    options = tile_options(x.dtype, num_rows, group_size if group_size < in_features else 0)
    out_tiles, row_tiles = triton.cdiv(out_features, options["BLOCK_OUT"]), triton.cdiv(num_rows, options["ROWS"])
    of_program = split_features(in_features, out_tiles * row_tiles)
    num_splits = triton.cdiv(in_features, of_program)
    sums = torch.empty(num_splits, num_rows, out_features, device=x.device)
    integer_linear_kernel[(out_tiles, num_splits, row_tiles)](
        x,
        codes,
        scales,
        zeros,
        sums,
        num_rows,
        out_features,
        in_features,
        num_groups,
        group_size,
        x.stride(0),
        of_program,
        BITS=num_bits,
        **options,
    )
    return add_partial_sums(sums, bias, out)


def _check(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, num_bits: int, group_size: int) -> None:
    in_features, (out_features, num_groups) = x.shape[1], scales.shape
    num_bytes = -(-in_features * num_bits // 8)
    if codes.shape != (out_features, num_bytes) or not codes.is_contiguous():
        raise ValueError(f"codes: expected contiguous [{out_features}, {num_bytes}], got {list(codes.shape)}")
    if not takes_groups_of(group_size, in_features) or num_groups != -(-in_features // group_size):
        raise ValueError(
            f"scales: expected one for each group of {group_size} of {in_features} inputs, and groups that are "
            f"multiples of 16 inputs, got {list(scales.shape)}"
        )
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and (tensor.shape != scales.shape or not tensor.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {list(scales.shape)}, got {list(tensor.shape)}")


def tile_options(dtype: torch.dtype, num_rows: int, group_size: int) -> dict[str, int]:
    """Tile sizes and launch options of the kernel; group_size 0: all inputs are one group."""
    wide = 32 if dtype == torch.float32 else 128  # fp32 has no tensor cores: operands lie in registers
    block_in = next(size for size in (wide, wide // 2, 16) if group_size % size == 0)
    rows = 16 if num_rows <= 16 or dtype == torch.float32 else 32
    block_out = 64 if dtype == torch.float32 else 128
    return {"ROWS": rows, "BLOCK_OUT": block_out, "BLOCK_IN": block_in, "num_warps": 4, "num_stages": 4}
