"""Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): random bits as a pure function of a counter and a key.

Counters and keys are 32-bit words held in int64 tensors, because torch has no 32 x 32 -> 64 bit product of unsigned
words. No intermediate leaves the range of int64, so nothing depends on how a device wraps. Kernels call the functions
ending in _jit, which work on uint32. On CPU numpy is several times faster, because it has unsigned words and can work
in place.
"""

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton import language as tl

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # golden ratio
_WEYL_1 = 0xBB67AE85  # sqrt(3) - 1
_MASK = np.uint64(_WORD_MASK)
_HALF = np.uint64(32)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of word * multiplier, for a word in [0, 2^32)."""
    # multiplier - 2^32 is in (-2^30, 0), so the product fits into int64. The 2^32 * word subtracted is added back to
    # the high word. The shift is arithmetic, so it rounds down, as required.
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _WORD_MASK


def philox4x32(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors of words in [0, 2^32), broadcastable against each other and the key.
        key: two such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        # Key first: keys are usually narrow (one for each row) and the product is wide.
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + _WEYL_0) & _WORD_MASK, (k1 + _WEYL_1) & _WORD_MASK
    return c0, c1, c2, c3


def token_words(seeds: Tensor, sample_indices: Tensor, positions: Tensor, token_groups: Tensor) -> Words4:
    """The random words of tokens 4g, 4g+1, 4g+2, 4g+3 for each g of token_groups.

    Key = seed, counter = (g, position, sample_index, 0). All arguments are int64 and broadcast against each other;
    seeds holds the 64 bits of an unsigned seed (two's complement), the others are in [0, 2^32).
    """
    key = (seeds & _WORD_MASK, (seeds >> 32) & _WORD_MASK)
    return philox4x32((token_groups, positions, sample_indices, torch.zeros_like(positions)), key)


def token_words_numpy(
    seeds: NDArray[np.int64],
    sample_indices: NDArray[np.int64],
    positions: NDArray[np.int64],
    token_groups: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """`token_words`: [num_columns] thrice and groups [num_lines, num_columns] -> [4, num_lines, num_columns].

    Fast as long as the results stay in the cache: up to a few thousand groups.
    """
    words = np.empty((4, *token_groups.shape), dtype=np.uint64)
    c0, c1, c2, c3 = words
    c0[:], c1[:], c2[:], c3[:] = token_groups, positions, sample_indices, 0
    k0, k1 = seeds.astype(np.uint64) & _MASK, seeds.astype(np.uint64) >> _HALF
    product0, product1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(_NUM_ROUNDS):
        np.multiply(c0, np.uint64(_MULTIPLIER_0), out=product0)
        np.multiply(c2, np.uint64(_MULTIPLIER_1), out=product1)
        np.right_shift(product1, _HALF, out=c0)
        c0 ^= c1
        c0 ^= k0
        np.right_shift(product0, _HALF, out=c2)
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(product1, _MASK, out=c1)
        np.bitwise_and(product0, _MASK, out=c3)
        k0, k1 = (k0 + np.uint64(_WEYL_0)) & _MASK, (k1 + np.uint64(_WEYL_1)) & _MASK
    return words


_KERNEL_MULTIPLIER_0 = tl.constexpr(_MULTIPLIER_0)
_KERNEL_MULTIPLIER_1 = tl.constexpr(_MULTIPLIER_1)
_KERNEL_WEYL_0 = tl.constexpr(_WEYL_0)
_KERNEL_WEYL_1 = tl.constexpr(_WEYL_1)
_KERNEL_NUM_ROUNDS = tl.constexpr(_NUM_ROUNDS)


@triton.jit
def philox4x32_jit(c0, c1, c2, c3, k0, k1):
    """`philox4x32` for uint32."""
    for _ in tl.static_range(_KERNEL_NUM_ROUNDS):
        high0, low0 = tl.umulhi(c0, _KERNEL_MULTIPLIER_0), c0 * _KERNEL_MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, _KERNEL_MULTIPLIER_1), c2 * _KERNEL_MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = k0 + _KERNEL_WEYL_0, k1 + _KERNEL_WEYL_1
    return c0, c1, c2, c3


@triton.jit
def token_words_jit(seed, sample_index, position, groups):
    """`token_words` for one row: int64 scalars and a block of groups -> four uint32 of its shape."""
    zero = tl.zeros_like(groups)
    c1 = (zero + position).to(tl.uint32)
    c2 = (zero + sample_index).to(tl.uint32)
    k0 = (zero + seed).to(tl.uint32)
    k1 = (zero + (seed >> 32)).to(tl.uint32)
    return philox4x32_jit(groups.to(tl.uint32), c1, c2, zero.to(tl.uint32), k0, k1)
