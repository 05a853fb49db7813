"""Quantised KV blocks for storage and transfer: 8 bits per element, of which a reader may use only the upper 4.

Asymmetric, keys per channel and values per token (KIVI, arXiv 2402.02750). A group of keys is one channel of one KV
block, so scales stay with the block. A group of values is one token of one KV head. With step = (greatest - least) /
255 an element is stored as code = round((x - least) / step), in two planes of nibbles (after QuantSpec, arXiv
2502.10424, but as one code that is split):

    code = 16 * upper + lower        8 bits: least + step * code                   off by at most step / 2
                                     4 bits: least + step * (16 * upper + 7.5)     off by at most 8 steps

8 steps are less than half a step of a quantiser with 4 bits alone, (greatest - least) / 30. A plane holds two channels
per byte, head_dim / 2 apart, channel i in the lower half of byte i. So each half of a head is read and written as one
piece. Scales are fp32, because the range of bf16 overflows fp16. Only full blocks make sense: an unused slot would
count in the scales of its channel.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton

_LAST_CODE = tl.constexpr(255.0)
_MIDDLE = tl.constexpr(7.5)  # the middle of a lower nibble's range
# For smaller steps fp32 loses bits or flushes to zero, so the group counts as constant.
_SMALLEST_STEP = tl.constexpr(2.0**-126)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedBlocks:
    """Quantised KV blocks. The leading dimensions [...] are those of the blocks: block and layer, say."""

    upper: Tensor  # uint8 [..., 2, block_size, num_kv_heads, head_dim / 2]; keys, then values
    lower: Tensor | None  # the same; None where only 4 bits were kept
    k_scales: Tensor  # fp32 [..., 2, num_kv_heads, head_dim]; least, then step
    v_scales: Tensor  # fp32 [..., 2, block_size, num_kv_heads]


@triton.jit
def _step_of(least, greatest):
    step = tl.div_rn(greatest - least, _LAST_CODE)
    return tl.where(step >= _SMALLEST_STEP, step, 0.0)


@triton.jit
def _encode(x, least, step):
    """0 to 255: at the greatest element the quotient is off by less than the half that is added."""
    return tl.floor(tl.div_rn(x - least, tl.where(step > 0, step, 1.0)) + 0.5).to(tl.int32)


@triton.jit
def _decode(code, least, step):
    return least + step * code


@triton.jit
def _pack(first, second):
    return (first | (second << 4)).to(tl.uint8)


@triton.jit
def quantise_kernel(
    kv_ptr,
    upper_ptr,
    lower_ptr,
    k_scales_ptr,
    v_scales_ptr,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HALF_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One head of the keys or of the values of a block: channels i and HALF_DIM + i side by side."""
    block, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    tokens, channels = (token < BLOCK_SIZE)[:, None], (channel < HALF_DIM)[None, :]
    mask = tokens & channels
    row = ((block * 2 + part) * BLOCK_SIZE + token) * num_kv_heads + head
    x_ptr = kv_ptr + row[:, None] * (2 * HALF_DIM) + channel[None, :]
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    inf = float("inf")
    if part == 0:
        k_scales = k_scales_ptr + (block * 2 * num_kv_heads + head) * (2 * HALF_DIM) + channel
        k_steps = k_scales + num_kv_heads * 2 * HALF_DIM
        kept = channel < HALF_DIM
        least_1 = tl.min(tl.where(tokens, first, inf), axis=0)
        least_2 = tl.min(tl.where(tokens, second, inf), axis=0)
        step_1 = _step_of(least_1, tl.max(tl.where(tokens, first, -inf), axis=0))
        step_2 = _step_of(least_2, tl.max(tl.where(tokens, second, -inf), axis=0))
        tl.store(k_scales, least_1, mask=kept)
        tl.store(k_scales + HALF_DIM, least_2, mask=kept)
        tl.store(k_steps, step_1, mask=kept)
        tl.store(k_steps + HALF_DIM, step_2, mask=kept)
        code_1 = _encode(first, least_1[None, :], step_1[None, :])
        code_2 = _encode(second, least_2[None, :], step_2[None, :])
    else:
        v_scales = v_scales_ptr + (block * 2 * BLOCK_SIZE + token) * num_kv_heads + head
        least = tl.min(tl.where(channels, tl.minimum(first, second), inf), axis=1)
        step = _step_of(least, tl.max(tl.where(channels, tl.maximum(first, second), -inf), axis=1))
        tl.store(v_scales, least, mask=token < BLOCK_SIZE)
        tl.store(v_scales + BLOCK_SIZE * num_kv_heads, step, mask=token < BLOCK_SIZE)
        code_1 = _encode(first, least[:, None], step[:, None])
        code_2 = _encode(second, least[:, None], step[:, None])
    plane = row[:, None] * HALF_DIM + channel[None, :]
    tl.store(upper_ptr + plane, _pack(code_1 >> 4, code_2 >> 4), mask=mask)
    tl.store(lower_ptr + plane, _pack(code_1 & 15, code_2 & 15), mask=mask)


@triton.jit
def dequantise_kernel(
    upper_ptr,
    lower_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    num_kv_heads,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    mask = (token < BLOCK_SIZE)[:, None] & (channel < HALF_DIM)[None, :]
    row = ((block * 2 + part) * BLOCK_SIZE + token) * num_kv_heads + head
    plane = row[:, None] * HALF_DIM + channel[None, :]
    upper = tl.load(upper_ptr + plane, mask=mask, other=0)
    first, second = (upper & 15).to(tl.float32) * 16, (upper >> 4).to(tl.float32) * 16
    if BITS == 8:
        lower = tl.load(lower_ptr + plane, mask=mask, other=0)
        first += (lower & 15).to(tl.float32)
        second += (lower >> 4).to(tl.float32)
    else:
        first += _MIDDLE
        second += _MIDDLE
    if part == 0:
        k_scales = k_scales_ptr + (block * 2 * num_kv_heads + head) * (2 * HALF_DIM) + channel
        k_steps = k_scales + num_kv_heads * 2 * HALF_DIM
        kept = channel < HALF_DIM
        least_1, step_1 = tl.load(k_scales, mask=kept), tl.load(k_steps, mask=kept)
        least_2, step_2 = tl.load(k_scales + HALF_DIM, mask=kept), tl.load(k_steps + HALF_DIM, mask=kept)
        first = _decode(first, least_1[None, :], step_1[None, :])
        second = _decode(second, least_2[None, :], step_2[None, :])
    else:
        v_scales = v_scales_ptr + (block * 2 * BLOCK_SIZE + token) * num_kv_heads + head
        least = tl.load(v_scales, mask=token < BLOCK_SIZE)
        step = tl.load(v_scales + BLOCK_SIZE * num_kv_heads, mask=token < BLOCK_SIZE)
        first = _decode(first, least[:, None], step[:, None])
        second = _decode(second, least[:, None], step[:, None])
    out = out_ptr + row[:, None] * (2 * HALF_DIM) + channel[None, :]
    tl.store(out, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF_DIM, second.to(out_ptr.dtype.element_ty), mask=mask)


def quantise_blocks(kv: Tensor) -> QuantisedBlocks:
    """Full KV blocks in codes of 8 bits.

    kv: contiguous floating [..., 2, block_size, num_kv_heads, head_dim], keys before values, as gather_blocks of
    block_copy.py stages them; finite. A group of equal elements comes back exactly.
    Raises ValueError naming the argument that does not fit.
    """
    _check_kv("kv", kv)
    if not runs_triton(kv):
        return quantise_blocks_reference(kv)
    *blocks, _, block_size, num_kv_heads, head_dim = kv.shape
    shape = (*blocks, 2, block_size, num_kv_heads, head_dim // 2)
    quantised = QuantisedBlocks(
        upper=torch.empty(shape, dtype=torch.uint8, device=kv.device),
        lower=torch.empty(shape, dtype=torch.uint8, device=kv.device),
        k_scales=torch.empty(*blocks, 2, num_kv_heads, head_dim, dtype=torch.float32, device=kv.device),
        v_scales=torch.empty(*blocks, 2, block_size, num_kv_heads, dtype=torch.float32, device=kv.device),
    )
    if kv.numel():
        grid = (kv.shape[:-4].numel(), num_kv_heads, 2)
        quantise_kernel[grid](
            kv,
            quantised.upper,
            quantised.lower,
            quantised.k_scales,
            quantised.v_scales,
            num_kv_heads,
            **_tile(block_size, head_dim),
            enable_fp_fusion=False,  # the same bits everywhere
        )
    return quantised


def dequantise_blocks(quantised: QuantisedBlocks, out: Tensor, *, bits: int = 8) -> None:
    """Dequantise KV blocks into `out`.

    bits: 8, or 4 to use only the upper plane; `lower` is then not read. out: contiguous floating [..., 2,
    block_size, num_kv_heads, head_dim] of the blocks that were quantised.
    Raises ValueError naming the argument that does not fit.
    """
    _check_kv("out", out)
    _check_quantised(quantised, out, bits)
    if not runs_triton(out):
        dequantise_blocks_reference(quantised, out, bits=bits)
    elif out.numel():
        *_, _, block_size, num_kv_heads, head_dim = out.shape
        dequantise_kernel[(out.shape[:-4].numel(), num_kv_heads, 2)](
            quantised.upper,
            quantised.lower,
            quantised.k_scales,
            quantised.v_scales,
            out,
            num_kv_heads,
            BITS=bits,
            **_tile(block_size, head_dim),
            enable_fp_fusion=False,
        )


def quantise_blocks_reference(kv: Tensor) -> QuantisedBlocks:
    """The definition."""
    k, v = kv.float().unbind(-4)  # [..., block_size, num_kv_heads, head_dim]
    k_codes, k_scales = _codes_and_scales(k, group_dim=-3)
    v_codes, v_scales = _codes_and_scales(v, group_dim=-1)
    first, second = torch.stack([k_codes, v_codes], dim=-4).chunk(2, dim=-1)
    return QuantisedBlocks(
        upper=(first >> 4) | (second >> 4 << 4),
        lower=(first & 15) | ((second & 15) << 4),
        k_scales=k_scales,
        v_scales=v_scales,
    )


def dequantise_blocks_reference(quantised: QuantisedBlocks, out: Tensor, *, bits: int = 8) -> None:
    """The definition."""
    lower = quantised.lower if bits == 8 else None
    codes = _both_channels(quantised.upper) * 16
    codes += _MIDDLE.value if lower is None else _both_channels(lower)
    k_least, k_step = quantised.k_scales.unsqueeze(-3).unbind(-4)  # [..., 1, num_kv_heads, head_dim]
    v_least, v_step = quantised.v_scales.unsqueeze(-1).unbind(-4)  # [..., block_size, num_kv_heads, 1]
    k_codes, v_codes = codes.unbind(-4)
    out.copy_(torch.stack([k_least + k_step * k_codes, v_least + v_step * v_codes], dim=-4))


def _codes_and_scales(x: Tensor, *, group_dim: int) -> tuple[Tensor, Tensor]:
    """uint8 codes like x, and fp32 scales [..., 2, ...] without the dimension of a group."""
    least, greatest = x.aminmax(dim=group_dim, keepdim=True)
    step = (greatest - least) / _LAST_CODE.value
    step = torch.where(step >= _SMALLEST_STEP.value, step, 0.0)
    codes = torch.floor((x - least) / torch.where(step > 0, step, 1.0) + 0.5)
    scales = torch.stack([least.squeeze(group_dim), step.squeeze(group_dim)], dim=-3)
    return codes.to(torch.uint8), scales


def _both_channels(plane: Tensor) -> Tensor:
    """fp32 nibbles of a plane, one per channel: [..., head_dim / 2] -> [..., head_dim]."""
    return torch.cat([plane & 15, plane >> 4], dim=-1).float()


def _tile(block_size: int, head_dim: int) -> dict[str, int]:
    return {
        "BLOCK_SIZE": block_size,
        "HALF_DIM": head_dim // 2,
        "TOKENS": triton.next_power_of_2(block_size),
        "CHANNELS": triton.next_power_of_2(head_dim // 2),
    }


def _check_kv(name: str, kv: Tensor) -> None:
    if kv.ndim < 4 or kv.shape[-4] != 2 or kv.shape[-1] % 2 or not (kv.is_contiguous() and kv.is_floating_point()):
        raise ValueError(
            f"{name}: expected contiguous floating [..., 2, block_size, num_kv_heads, head_dim] with an even head_dim, "
            f"got {kv.dtype} {list(kv.shape)} with strides {list(kv.stride())}"
        )


def _check_quantised(quantised: QuantisedBlocks, out: Tensor, bits: int) -> None:
    if bits not in (4, 8) or (bits == 8 and quantised.lower is None):
        raise ValueError(f"bits: expected 4, or 8 where both planes were kept, got {bits}")
    *blocks, _, block_size, num_kv_heads, head_dim = out.shape
    plane = (*blocks, 2, block_size, num_kv_heads, head_dim // 2)
    for name, x, shape, dtype in (
        ("upper", quantised.upper, plane, torch.uint8),
        ("lower", quantised.lower, plane, torch.uint8),
        ("k_scales", quantised.k_scales, (*blocks, 2, num_kv_heads, head_dim), torch.float32),
        ("v_scales", quantised.v_scales, (*blocks, 2, block_size, num_kv_heads), torch.float32),
    ):
        if x is not None and (x.shape != shape or x.dtype != dtype or not x.is_contiguous()):
            raise ValueError(
                f"quantised.{name}: expected contiguous {dtype} {list(shape)} for out, got {x.dtype} {list(x.shape)}"
            )
