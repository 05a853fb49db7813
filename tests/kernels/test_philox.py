"""Random bits: the published vectors, and the layout of counter and key."""

import pytest
import torch

from kernels.sampling.philox import Words4, philox4x32, token_words

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_of_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The same function with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def row(words: Words4, index: int) -> tuple[int, ...]:
    return tuple(int(word[index]) for word in words)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert row(philox4x32((c0, c1, c2, c3), (k0, k1)), 0) == expected


def test_equals_the_integer_version_on_random_words() -> None:
    generator = torch.Generator().manual_seed(0)
    c0, c1, c2, c3, k0, k1 = torch.randint(0, 1 << 32, (6, 200), generator=generator)
    words = philox4x32((c0, c1, c2, c3), (k0, k1))
    for index in range(200):
        counter = tuple(int(c[index]) for c in (c0, c1, c2, c3))
        assert row(words, index) == philox_of_integers(counter, (int(k0[index]), int(k1[index])))


@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, (1 << 63) + 5, (1 << 64) - 1])
def test_counter_is_group_position_sample_and_key_is_the_seed(seed: int) -> None:
    signed = seed - (1 << 64) if seed >> 63 else seed
    group, position, sample_index = 32_063, 131_071, 7
    words = token_words(
        torch.tensor([signed]), torch.tensor([sample_index]), torch.tensor([position]), torch.tensor([group])
    )
    assert row(words, 0) == philox_of_integers((group, position, sample_index, 0), (seed & 0xFFFFFFFF, seed >> 32))
