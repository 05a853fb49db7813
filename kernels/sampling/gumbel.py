"""Gumbel noise with the same bits on every device: one number for each (seed, sample, position, token).

The logarithm is our own, because libraries differ in the last bits and the noise decides which token is chosen. It uses
only +, -, *, / on fp32 (each correctly rounded by IEEE 754) and integer operations, one torch operator each, so no
multiply is ever fused with an add. A kernel that calls the functions ending in _jit must be launched with
`enable_fp_fusion=False` (EXACT). The method and the coefficients come from FreeBSD's e_logf.c.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.sampling.philox import token_words, token_words_jit

# Options of every launch whose result depends on single bits. Explicit, because Triton's default differs by version.
EXACT = {"enable_fp_fusion": False}

# Bounds of the noise with a margin of over 0.02; its true range is [-2.8114, 22.8739].
NOISE_MIN = -2.9
NOISE_MAX = 22.9

LARGEST_UNIFORM = 1.0 - 2.0**-24  # the largest fp32 below 1
LN2_HIGH = float.fromhex("0x1.62e300p-1")  # 17 bits, so its product with a small integer is exact
LN2_LOW = float.fromhex("0x1.2fefa2p-17")
_LOG_1 = float.fromhex("0xaaaaaap-24")
_LOG_2 = float.fromhex("0xccce13p-25")
_LOG_3 = float.fromhex("0x91e9eep-25")
_LOG_4 = float.fromhex("0xf89e26p-26")
_SQRT_HALF_BITS = 0x3F3504F3
_ONE_BITS = 0x3F800000
_MANTISSA_BITS = 23


def _exponent(x: Tensor) -> Tensor:
    """The k for which x / 2^k lies in [sqrt(1/2), sqrt(2)): normal positive fp32 -> int32."""
    return (x.view(torch.int32) - _SQRT_HALF_BITS) >> _MANTISSA_BITS


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as fp32, for int32 exponents of normal numbers."""
    return ((exponent << _MANTISSA_BITS) + _ONE_BITS).view(torch.float32)


def _log_of_scaled(f: Tensor, exponent: Tensor) -> Tensor:
    """log(2^exponent * (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2))."""
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    odd = z * (w * _LOG_3 + _LOG_1)
    even = w * (w * _LOG_4 + _LOG_2)
    half_square = (f * 0.5) * f
    k = exponent.to(torch.float32)
    small = s * (half_square + (odd + even)) + k * LN2_LOW
    return (small - half_square) + f + k * LN2_HIGH


def log_fp32(x: Tensor) -> Tensor:
    """log(x) for normal positive fp32, within 2 units in the last place away from x = 1."""
    exponent = _exponent(x)
    return _log_of_scaled(x * _power_of_two(-exponent) - 1.0, exponent)


def log1p_negated(w: Tensor) -> Tensor:
    """log(1 - w) for fp32 w in [2^-33, 1 - 2^-24], within 2 units in the last place."""
    exponent = _exponent(1.0 - w)
    scale = _power_of_two(-exponent)
    # Scaled before the subtraction, which is then exact (Sterbenz), so no bit of a small w is lost.
    return _log_of_scaled((scale - 1.0) - w * scale, exponent)


def noise_from_words(words: Tensor) -> Tensor:
    """Gumbel noise -log(-log1p(-w)) of 32 random bits each: int64 in [0, 2^32) -> fp32.

    w = min((word + 1/2) / 2^32, 1 - 2^-24). The large noise that decides who wins comes from small w, where fp32 still
    distinguishes all 2^32 words. Uniforms near 1, or with 24 bits, would tie at the top.
    """
    w = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=LARGEST_UNIFORM)
    return -log_fp32(-log1p_negated(w))


def gumbel_noise(seeds: Tensor, sample_indices: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of single tokens: four int64 tensors of one shape -> fp32 of that shape."""
    words = torch.stack(token_words(seeds, sample_indices, positions, token_ids >> 2), dim=-1)
    return noise_from_words(words.gather(-1, (token_ids & 3).unsqueeze(-1)).squeeze(-1))


def gumbel_noise_range(
    seeds: Tensor, sample_indices: Tensor, positions: Tensor, *, first_token_id: int, num_tokens: int
) -> Tensor:
    """Noise of num_tokens tokens from first_token_id on: three int64 [num_rows] -> fp32 [num_rows, num_tokens].

    The same numbers as `gumbel_noise` at a quarter of the work.
    """
    first_group, skipped = divmod(first_token_id, 4)
    num_groups = (skipped + num_tokens + 3) // 4
    groups = torch.arange(first_group, first_group + num_groups, device=seeds.device)
    rows = (seeds.unsqueeze(1), sample_indices.unsqueeze(1), positions.unsqueeze(1))
    words = torch.stack(token_words(*rows, groups), dim=-1).flatten(1)  # [num_rows, 4 * num_groups]
    return noise_from_words(words[:, skipped : skipped + num_tokens])


_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)
_LN2_HIGH = tl.constexpr(LN2_HIGH)
_LN2_LOW = tl.constexpr(LN2_LOW)
_KERNEL_LOG_1 = tl.constexpr(_LOG_1)
_KERNEL_LOG_2 = tl.constexpr(_LOG_2)
_KERNEL_LOG_3 = tl.constexpr(_LOG_3)
_KERNEL_LOG_4 = tl.constexpr(_LOG_4)
_KERNEL_SQRT_HALF_BITS = tl.constexpr(_SQRT_HALF_BITS)
_KERNEL_ONE_BITS = tl.constexpr(_ONE_BITS)
_KERNEL_MANTISSA_BITS = tl.constexpr(_MANTISSA_BITS)
_BOUND_MARGIN = tl.constexpr(1e-3)  # far larger than the rounding errors
_LN2 = tl.constexpr(LN2_HIGH + LN2_LOW)


@triton.jit
def _exponent_jit(x):
    return (x.to(tl.int32, bitcast=True) - _KERNEL_SQRT_HALF_BITS) >> _KERNEL_MANTISSA_BITS


@triton.jit
def _power_of_two_jit(exponent):
    return ((exponent << _KERNEL_MANTISSA_BITS) + _KERNEL_ONE_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _log_of_scaled_jit(f, exponent):
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    w = z * z
    odd = z * (w * _KERNEL_LOG_3 + _KERNEL_LOG_1)
    even = w * (w * _KERNEL_LOG_4 + _KERNEL_LOG_2)
    half_square = (f * 0.5) * f
    k = exponent.to(tl.float32)
    small = s * (half_square + (odd + even)) + k * _LN2_LOW
    return (small - half_square) + f + k * _LN2_HIGH


@triton.jit
def _uniform_jit(words):
    return tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST_UNIFORM)  # 2^-32


@triton.jit
def noise_from_words_jit(words):
    """`noise_from_words` of uint32."""
    w = _uniform_jit(words)
    exponent = _exponent_jit(1.0 - w)
    scale = _power_of_two_jit(-exponent)
    negative = -_log_of_scaled_jit((scale - 1.0) - w * scale, exponent)
    exponent = _exponent_jit(negative)
    return -_log_of_scaled_jit(negative * _power_of_two_jit(-exponent) - 1.0, exponent)


@triton.jit
def noise_bounds_jit(words):
    """Lower and upper bound of the noise of a word, at a tenth of its cost. They are close if the noise is large.

    The bits of a float, read as an integer, are a logarithm: log2(w) lies up to 0.0861 above bits / 2^23 - 127.
    Up to w = 1/2, w <= -log1p(-w) <= w * e^w, so the noise is between -log(w) - w and -log(w). For larger w it is at
    most log(16.7) < 3 below -log(w).
    """
    w = _uniform_jit(words)
    below = w.to(tl.int32, bitcast=True).to(tl.float32) * (_LN2 * 2.0**-23) - 127 * _LN2
    upper = _BOUND_MARGIN - below
    return upper - (0.0861 * _LN2 + 2 * _BOUND_MARGIN) - tl.where(w <= 0.5, w, 3.0), upper


@triton.jit
def gumbel_noise_jit(seed, sample_index, position, token_ids):
    """`gumbel_noise` for one row: int64 scalars and a block of int64 -> fp32 of its shape."""
    w0, w1, w2, w3 = token_words_jit(seed, sample_index, position, token_ids >> 2)
    word = token_ids & 3
    return noise_from_words_jit(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))
