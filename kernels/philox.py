"""Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011): random bits as a pure function of a counter and a key.

Counters and keys are 32-bit words held in int64 tensors, since torch has no 32 x 32 -> 64 bit product of unsigned
words. No intermediate leaves the range of int64, so nothing depends on how a device wraps.
"""

import torch
from torch import Tensor

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]

WORD_MASK = 0xFFFFFFFF
NUM_ROUNDS = 10
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9  # golden ratio
WEYL_1 = 0xBB67AE85  # sqrt(3) - 1


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of word * multiplier, for a word in [0, 2^32)."""
    # multiplier - 2^32 lies in (-2^30, 0), so the product fits into int64; the 2^32 * word taken away is given back
    # to the high word. The shift is arithmetic, that is, it rounds down, as it must.
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & WORD_MASK


def philox4x32(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors of words in [0, 2^32), broadcastable against each other and the key.
        key: two such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIER_0)
        high1, low1 = _multiply(c2, MULTIPLIER_1)
        # Key first: keys are usually narrow (one for each row) and the product is wide.
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + WEYL_0) & WORD_MASK, (k1 + WEYL_1) & WORD_MASK
    return c0, c1, c2, c3


def token_words(seeds: Tensor, sample_indices: Tensor, positions: Tensor, token_groups: Tensor) -> Words4:
    """The random words of tokens 4g, 4g+1, 4g+2, 4g+3 for each g of token_groups.

    Key = seed, counter = (g, position, sample_index, 0). All arguments are int64 and broadcast against each other;
    seeds holds the 64 bits of an unsigned seed (two's complement), the others are in [0, 2^32).
    """
    key = (seeds & WORD_MASK, (seeds >> 32) & WORD_MASK)
    return philox4x32((token_groups, positions, sample_indices, torch.zeros_like(positions)), key)
