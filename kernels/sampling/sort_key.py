"""A float and a token id in one integer whose order is: larger value first, lower id first among equals."""

import torch
import triton
from torch import Tensor
from triton import language as tl

_ID_MASK = 0xFFFFFFFF
EXCLUDED_KEY = -(0x7F800001 << 32)  # of -Inf and the largest id: no token has a lower key
_KERNEL_ID_MASK = tl.constexpr(_ID_MASK)


def pack_sort_key(values: Tensor, token_ids: Tensor) -> Tensor:
    """fp32 values without NaN and int64 ids in [0, 2^32), broadcastable -> int64, the larger the better."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0, so the two are equal here too
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats: a larger magnitude becomes a smaller integer
    return (ordered.to(torch.int64) << 32) | (_ID_MASK - token_ids)


def unpack_sort_key(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the token ids that `pack_sort_key` was given."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _ID_MASK - (keys & _ID_MASK)


@triton.jit
def ordered_jit(values):
    """fp32 without NaN -> int32 of the same order."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_jit(ordered):
    """What `ordered_jit` was given."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack_sort_key_jit(values, token_ids):
    """`pack_sort_key`. All bits of an id flipped are the mask minus the id."""
    return (ordered_jit(values).to(tl.int64) << 32) | (token_ids.to(tl.int64) ^ _KERNEL_ID_MASK)


@triton.jit
def unpack_sort_key_jit(keys):
    """`unpack_sort_key`."""
    return from_ordered_jit((keys >> 32).to(tl.int32)), (keys & _KERNEL_ID_MASK) ^ _KERNEL_ID_MASK
