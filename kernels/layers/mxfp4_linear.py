"""Products of a few rows with an MXFP4 weight, made to read its 4.25 bits per element once, at full speed.

The kernel takes 8 codes at a time, as the 32-bit word that holds them, and never moves them between threads. Shifts and
masks turn it into four words of two 16-bit floats each, elements j and j + 4, whose exponent is too small by a
constant. Multiplying by that constant and by the factor of their block makes them weights. The inputs are put into the
same order, element j + 4 beside element j, which costs little because they are few. The code for sm_90 has about 5
instructions per weight in all; a multiprocessor of an H200 has time for 3.3 while codes come at 4.8 TB/s.

Codes 1 and 9 are subnormal before the multiplication. Neither PTX's bf16 multiplication nor the fp16 one without .ftz
flushes them to zero. bf16 and fp32 hold every weight exactly, fp16 those of 2^-24 to 65504.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.interpreter_numpy import accept_loop_bounds
from kernels.layers.mxfp4 import check_mxfp4, dequantize_mxfp4
from kernels.layers.partial_sums import add_partial_sums

accept_loop_bounds()

_MAX_KERNEL_ROWS = 64  # with more, the tensor cores are so busy that expanding the whole weight first pays
ENOUGH_PROGRAMS = 528  # four for each multiprocessor of an H100 or H200
MIN_SPLIT_FEATURES = 512
_CPU_TILE_WEIGHTS = 1 << 19  # dequantised at a time: stays in the cache of a core


@triton.jit
def decode_words(words, dtype: tl.constexpr):
    """8 codes of each int32 word in dtype, fp16 or bf16: [..] -> [.., j // 2, j % 2, half] is element j + 4 * half.

    The values are 2^14 (fp16) or 2^126 (bf16) times too small: the bits of a code at the lower end of the exponent.
    """
    even = tl.join(_decode_two(words, 0, dtype), _decode_two(words, 2, dtype))
    odd = tl.join(_decode_two(words, 1, dtype), _decode_two(words, 3, dtype))
    pairs = tl.join(even, odd)
    return tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def _decode_two(words, J: tl.constexpr, dtype: tl.constexpr):
    """Elements J and J + 4 in the halves of an int32: sign to bit 15, exponent and mantissa to the mantissa's end."""
    LOWEST: tl.constexpr = 6 if dtype == tl.bfloat16 else 9
    if LOWEST >= 4 * J:
        magnitudes = words << (LOWEST - 4 * J)
    else:
        magnitudes = words >> (4 * J - LOWEST)
    return (magnitudes & (0x00070007 << LOWEST)) | ((words << (12 - 4 * J)) & -0x7FFF8000)


@triton.jit
def block_factors(scales, dtype: tl.constexpr):
    """2^(X - 127) of scale bytes: exact in bf16 and fp32, NaN for 255; 0 and 2^-127 have the same bits but for one."""
    wide = scales.to(tl.int32)
    if dtype == tl.bfloat16:
        bits = tl.maximum(wide << 7, 0x0040) + (((wide + 1) & 256) >> 2)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    bits = tl.maximum(wide << 23, 0x00400000) + (((wide + 1) & 256) << 14)
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def mxfp4_linear_kernel(
    x_ptr,  # [num_rows, in_features], rows may be strided
    packed_ptr,  # int32 [out_features, in_features / 8]
    scale_ptr,  # uint8 [out_features, in_features / 32]
    sum_ptr,  # fp32 [num_splits, num_rows, out_features]
    num_rows,
    out_features,
    in_features,
    x_stride,
    split_features,  # inputs of one program; BLOCK_IN divides it and in_features
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    code_dtype: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    EXPONENT_SHIFT: tl.constexpr = 2.0**126 if dtype == tl.bfloat16 else 2.0**14  # what decode_words leaves out
    WORDS: tl.constexpr = BLOCK_IN // 8
    BLOCKS: tl.constexpr = BLOCK_IN // 32
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]
    feature = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    row_mask = row < num_rows
    feature = tl.minimum(feature, out_features - 1)  # rows beyond are the last one again, and not stored
    x_ptrs = x_ptr + row.to(tl.int64) * x_stride
    packed_ptrs = packed_ptr + feature.to(tl.int64) * (in_features // 8)
    scale_ptrs = scale_ptr + feature.to(tl.int64) * (in_features // 32)
    begin = tl.program_id(1) * split_features
    total = tl.zeros([ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + split_features, in_features), BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)[None, :]
        word = start // 8 + tl.arange(0, WORDS)[None, :]
        block = start // 32 + tl.arange(0, BLOCKS)[None, :]
        x = tl.load(x_ptrs + column, row_mask, other=0.0)
        words = tl.load(packed_ptrs + word)
        scales = tl.load(scale_ptrs + block)
        x = x.reshape(ROWS, WORDS, 2, 4).permute(0, 1, 3, 2).reshape(ROWS, BLOCK_IN)
        weight = decode_words(words, code_dtype).reshape(BLOCK_OUT, BLOCKS, 32)
        weight = (weight * EXPONENT_SHIFT).to(dtype) * block_factors(scales, dtype)[:, :, None]
        # Transposed while it has three dimensions: Triton then decodes in the layout of the product, and nothing moves.
        weight = weight.permute(1, 2, 0).reshape(BLOCK_IN, BLOCK_OUT)
        total = tl.dot(x, weight, total, input_precision="ieee")
    out_feature = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    offsets = (tl.program_id(1).to(tl.int64) * num_rows + row) * out_features + out_feature
    tl.store(sum_ptr + offsets, total, row_mask & (out_feature < out_features))


def mxfp4_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x @ weight^T for a weight of quantize_mxfp4, exact products added in fp32, rounded once.

    x: bf16, fp16 or fp32 [num_rows, in_features]; packed, scales: uint8 [out_features, in_features / 2] and [..,
    in_features / 32]. Returns [num_rows, out_features] like x. Made for 1 to 64 rows; more rows multiply with a dense
    copy of the weight, made anew in each call. Raises ValueError naming the argument that does not fit.
    """
    check_mxfp4(packed, scales)
    if x.ndim != 2 or x.shape[1] != 2 * packed.shape[1]:
        raise ValueError(f"x: expected [num_rows, {2 * packed.shape[1]}] for packed, got {list(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x: expected bf16, fp16 or fp32, got {x.dtype}")
    if not runs_triton(x):
        return mxfp4_linear_cpu(x, packed, scales)
    if x.shape[0] > _MAX_KERNEL_ROWS:
        return F.linear(x, dequantize_mxfp4(packed, scales, x.dtype))
    return _launch(x, packed, scales)


def mxfp4_linear_reference(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """The definition: dequantise, multiply in fp32."""
    return F.linear(x.float(), dequantize_mxfp4(packed, scales)).to(x.dtype)


def mxfp4_linear_cpu(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Computes a few output features at a time, so that their dense weights stay in the cache.

    A CPU has no time to spare for decoding: 0.5 ns per weight and core in all (torch 2.13, AVX-512), several times what
    a packed bf16 weight takes for one row. It saves memory, not time.
    """
    out_features, in_features = packed.shape[0], x.shape[1]
    features_at_once = max(1, _CPU_TILE_WEIGHTS // max(1, in_features))
    out = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, features_at_once):
        tile = slice(start, start + features_at_once)
        out[:, tile] = F.linear(x, dequantize_mxfp4(packed[tile], scales[tile], x.dtype))
    return out


def _launch(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    num_rows, in_features = x.shape
    out_features = packed.shape[0]
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0 or in_features == 0:
        return out.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    options = tile_options(x.dtype, num_rows, in_features)
    out_tiles, row_tiles = triton.cdiv(out_features, options["BLOCK_OUT"]), triton.cdiv(num_rows, options["ROWS"])
    of_program = split_features(in_features, out_tiles * row_tiles)
    num_splits = triton.cdiv(in_features, of_program)
    sums = torch.empty(num_splits, num_rows, out_features, device=x.device)
    mxfp4_linear_kernel[(out_tiles, num_splits, row_tiles)](
        x,
        packed.view(torch.int32),
        scales,
        sums,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        of_program,
        **options,
    )
    return add_partial_sums(sums, None, out)


def tile_options(dtype: torch.dtype, num_rows: int, in_features: int) -> dict[str, int]:
    """Tile sizes and launch options of the kernel."""
    block_in = next(size for size in (128, 64, 32) if in_features % size == 0)
    if dtype == torch.float32:  # no tensor cores: operands lie in registers, so tiles are small
        return {"ROWS": 16, "BLOCK_OUT": 64, "BLOCK_IN": 32, "num_warps": 4, "num_stages": 2}
    rows = 16 if num_rows <= 16 else 32
    return {"ROWS": rows, "BLOCK_OUT": 128, "BLOCK_IN": block_in, "num_warps": 4, "num_stages": 4}


def split_features(in_features: int, num_tiles: int) -> int:
    """Inputs of one program, so that there are about ENOUGH_PROGRAMS: a multiple of every BLOCK_IN."""
    wanted_splits = max(1, ENOUGH_PROGRAMS // num_tiles)
    return max(MIN_SPLIT_FEATURES, -(-in_features // wanted_splits // 128) * 128)
