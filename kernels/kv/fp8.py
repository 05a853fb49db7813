"""KV caches in FP8: E4M3 numbers (arXiv 2209.05433), each the value divided by a power of two of its head.

A power of two leaves the fraction alone: a number that comes back is exact in bfloat16 and fp32, and the error is that
of E4M3, 1/16 of a value at most, as long as the value is not far below the scale. Larger values than 448 scales become
448 scales. NaN stays NaN.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GREATEST = 448.0  # of E4M3
_HEADROOM = 2.0  # of the greatest value seen, for those that come later; not measured


@dataclass(frozen=True, slots=True)
class KVScales:
    """Of one layer: fp32 [num_kv_heads] on the device of the caches, which hold uint8, the bits of E4M3."""

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "KVScales":
        """k, v: [..., num_kv_heads, head_dim], values like those to come. A head of zeros gets 1."""
        return cls(_scales(k), _scales(v))


def _scales(x: Tensor) -> Tensor:
    greatest = x.float().abs().flatten(0, -3).amax((0, 2)).tolist()  # of each head
    return torch.tensor(
        [2.0 ** math.ceil(math.log2(most * _HEADROOM / _GREATEST)) if most > 0 else 1.0 for most in greatest],
        device=x.device,
    )


def to_fp8(x: Tensor, scales: Tensor) -> Tensor:
    """x: [..., num_heads, head_dim]; scales: [num_heads]. Returns uint8, rounded to nearest even."""
    scaled = (x.float() / scales[:, None]).clamp(-_GREATEST, _GREATEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def from_fp8(bits: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, but for rounding."""
    return (bits.view(torch.float8_e4m3fn).float() * scales[:, None]).to(dtype)
