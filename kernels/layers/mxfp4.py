"""MXFP4, the 4-bit weights of the OCP Microscaling format v1.0: the direct cast and its inverse.

32 neighbours along the inputs share a scale byte X (E8M0): 2^(X - 127), 255 for NaN. An element is a code of 4 bits
(E2M1): a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. Element 2i is the low nibble of byte i, element 2i + 1 the high
one. That is 4.25 bits per weight. The cast takes 2^(floor(log2(largest)) - 2) as the scale of a block and rounds to
nearest, ties to the even code. Values beyond 6 become 6.

The kernel rounds the bits of fp32 as integers, so that no device's flush to zero can change a code.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton

BLOCK_SIZE = 32  # elements that share a scale
_SCALE_BIAS = 127
_NAN_SCALE = 255
ELEMENT_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; codes 8 and up are their negatives
_LARGEST_EXPONENT = 2  # of an element: 4 = 2^2
_TILE_BLOCKS = 32  # of one program
_REFERENCE_ELEMENTS = 1 << 22  # at a time, to bound memory


@triton.jit
def quantize_kernel(
    weight_ptr,  # [num_rows, blocks_per_row * 32], rows may be strided
    packed_ptr,
    scale_ptr,
    num_blocks,
    blocks_per_row,
    row_stride,
    TILE: tl.constexpr,
):
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = block < num_blocks
    row, column = (block // blocks_per_row).to(tl.int64), (block % blocks_per_row) * 32
    offsets = (row * row_stride + column)[:, None] + tl.arange(0, 32)[None, :]
    values = tl.load(weight_ptr + offsets, mask[:, None], other=0.0).to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF  # these integers have the order of the magnitudes
    exponent = magnitude >> 23
    largest = tl.max(exponent, axis=1)
    scale = tl.where(largest == 255, 255, tl.maximum(largest - 2, 0))

    # A magnitude is significand * 2^(above - 23) scales; significands of subnormals have no leading one.
    fraction = magnitude & 0x7FFFFF
    significand = tl.where(exponent == 0, fraction << 1, fraction | 0x800000)
    above = exponent - scale[:, None]  # powers of two from the scale to the leading bit: at most 2
    # Codes count halves below 2, ones below 4 and twos above, so 22 bits go, and one more for each power below 1.
    shift = tl.minimum(22 - tl.minimum(above, 0), 26)
    rounded = (significand + (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)) >> shift
    code = tl.minimum(rounded + 2 * tl.maximum(above, 0), 7) | ((bits >> 28) & 8)
    code = tl.where((largest == 255)[:, None], 0, code)

    low, high = tl.split(code.reshape(TILE, 16, 2))
    packed_offsets = block.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(packed_ptr + packed_offsets, (low | (high << 4)).to(tl.uint8), mask[:, None])
    tl.store(scale_ptr + block, scale.to(tl.uint8), mask)


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast a weight to MXFP4: (codes, scales), uint8 [out_features, in_features / 2] and [.., in_features / 32].

    weight: fp32, bf16 or fp16 [out_features, in_features], in_features a multiple of 32, rows may be strided. A block
    with NaN or infinity becomes NaN as a whole; zeros keep their sign, and a block of zeros has scale 0. Casting what
    dequantize_mxfp4 returns gives the same bytes. Raises ValueError where the weight does not fit.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE:
        raise ValueError(
            f"weight: expected [out_features, in_features] with in_features a multiple of {BLOCK_SIZE}, got "
            f"{list(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight: expected fp32, bf16 or fp16, got {weight.dtype}")
    if not runs_triton(weight):
        return quantize_mxfp4_reference(weight)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    num_rows, blocks_per_row = weight.shape[0], weight.shape[1] // BLOCK_SIZE
    packed = torch.empty(num_rows, weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_rows, blocks_per_row, dtype=torch.uint8, device=weight.device)
    if scales.numel():
        quantize_kernel[(triton.cdiv(scales.numel(), _TILE_BLOCKS),)](
            weight, packed, scales, scales.numel(), blocks_per_row, weight.stride(0), TILE=_TILE_BLOCKS
        )
    return packed, scales


def quantize_mxfp4_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: scale each block, compare with the rounding thresholds. A few rows at a time."""
    packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(weight.shape[0], weight.shape[1] // BLOCK_SIZE, dtype=torch.uint8, device=weight.device)
    rows_at_once = max(1, _REFERENCE_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        codes, block_scales = _cast_blocks(weight[rows].float().unflatten(1, (-1, BLOCK_SIZE)))
        codes = codes.view(codes.shape[0], -1, 2)
        packed[rows] = codes[..., 0] | (codes[..., 1] << 4)
        scales[rows] = block_scales
    return packed, scales


def dequantize_mxfp4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that codes and scales represent: [out_features, in_features] in `dtype`.

    bf16 holds all of them exactly, except products beyond its range, which become infinite as the format says. fp32
    gets the same numbers, fp16 rounds them. Looks up four elements at once: 0.4 ns per weight on a core with AVX-512.
    Raises ValueError if the arguments do not fit.
    """
    check_mxfp4(packed, scales)
    quads = packed.flatten().view(torch.uint16).int()
    weight = _values_of_quads(packed.device).index_select(0, quads).view(torch.bfloat16)
    weight.view(-1, BLOCK_SIZE).mul_(scale_values(scales).bfloat16().view(-1, 1))
    return weight.view(packed.shape[0], 2 * packed.shape[1]).to(dtype)


def scale_values(scales: Tensor) -> Tensor:
    """2^(X - 127) in fp32, NaN for 255: uint8 of any shape -> fp32 of that shape."""
    exponents = torch.arange(256, device=scales.device)
    bits = exponents << 23
    bits[0] = 1 << 22  # 2^-127 is subnormal
    bits[_NAN_SCALE] = 0x7FC00000
    return bits.int().view(torch.float32)[scales.int()]


def check_mxfp4(packed: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless these are the codes and scales of one weight."""
    for name, x in (("packed", packed), ("scales", scales)):
        if x.ndim != 2 or x.dtype != torch.uint8 or not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous uint8 matrix, got {x.dtype} {list(x.shape)}")
    if packed.shape != (scales.shape[0], scales.shape[1] * BLOCK_SIZE // 2):
        raise ValueError(f"scales: expected one byte for 16 of packed {list(packed.shape)}, got {list(scales.shape)}")


def _cast_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [rows, blocks, 32] -> codes, uint8 of that shape, and scales, uint8 [rows, blocks]."""
    largest = blocks.abs().amax(dim=-1)
    invalid = ~blocks.isfinite().all(dim=-1)
    exponents = torch.frexp(largest).exponent - 1  # floor(log2)
    scales = (exponents - _LARGEST_EXPONENT + _SCALE_BIAS).clamp(min=0)
    scales = torch.where(largest == 0, 0, scales)
    scaled = torch.ldexp(blocks, _SCALE_BIAS - scales.unsqueeze(-1)).abs()
    codes = (scaled > 0.25).to(torch.uint8)  # 0.25 is a tie, and 0 the even code
    for border, to_even in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        codes += (scaled >= border) if to_even else (scaled > border)
    codes |= blocks.signbit().to(torch.uint8) << 3
    codes.masked_fill_(invalid.unsqueeze(-1), 0)
    return codes, torch.where(invalid, _NAN_SCALE, scales).to(torch.uint8)


@cache
def _values_of_quads(device: torch.device) -> Tensor:
    """Four elements for every two bytes, as bf16 in an int64: [65536]."""
    magnitudes = torch.tensor(ELEMENT_VALUES, device=device, dtype=torch.bfloat16)
    values = torch.cat([magnitudes, -magnitudes])
    quads = torch.arange(1 << 16, device=device)
    return torch.stack([values[(quads >> shift) & 15] for shift in (0, 4, 8, 12)], dim=1).view(torch.int64).squeeze(1)
