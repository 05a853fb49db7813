"""The noise: its distribution, its accuracy up to the tails, and bits that depend only on the random words."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.sampling.gumbel import (
    LARGEST_UNIFORM,
    NOISE_MAX,
    NOISE_MIN,
    gumbel_noise,
    gumbel_noise_range,
    log1p_negated,
    log_fp32,
    noise_from_words,
)

LAST_WORD = (1 << 32) - 1
PINNED_NOISE = ["41b6fda9", "41ae33b3", "414c2793", "41051511", "402f643d", "3ebba795", "be39cee3", "c033f049"]
PINNED_SUM = 282_398_988_720_979


def words_everywhere() -> Tensor:
    """Random words of every magnitude, and all of the smallest and largest."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(0, 1 << 32, (300_000,), generator=generator)
    log_uniform = (2.0 ** (32 * torch.rand(300_000, generator=generator, dtype=torch.float64))).long() - 1
    ends = torch.arange(100_000)
    return torch.cat((uniform, log_uniform, ends, LAST_WORD - ends))


def errors_in_ulp(found: Tensor, exact: np.ndarray) -> float:
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(found.double().numpy() - exact) / ulp).max())


def test_log_is_accurate_over_its_range() -> None:
    generator = torch.Generator().manual_seed(1)
    x = 2.0 ** (torch.rand(1_000_000, generator=generator, dtype=torch.float64) * 37.1 - 33)
    x = torch.cat((x, torch.linspace(0.99, 1.01, 100_001, dtype=torch.float64))).float()
    assert errors_in_ulp(log_fp32(x), np.log(x.double().numpy())) < 1.5


def test_log1p_is_accurate_at_both_ends() -> None:
    w = ((words_everywhere().float() + 0.5) * 2.0**-32).clamp(max=LARGEST_UNIFORM)
    assert errors_in_ulp(log1p_negated(w), np.log1p(-w.double().numpy())) < 1.5


def test_noise_is_accurate_at_both_ends() -> None:
    words = words_everywhere()
    w = np.minimum((words.numpy() + 0.5) / 2.0**32, 1 - 2.0**-24)
    exact = -np.log(-np.log1p(-w))
    # fp32 rounds w by up to 2^-24, relative; this is how much such a change of w moves the noise.
    rounding_of_w = 2.0**-24 * w / ((1 - w) * -np.log1p(-w))
    error = np.abs(noise_from_words(words).double().numpy() - exact)
    assert (error <= 1.1 * rounding_of_w + 2 * np.spacing(np.maximum(np.abs(exact), 0.5).astype(np.float32))).all()


def test_bounds_hold_with_little_to_spare() -> None:
    noise = noise_from_words(torch.cat((words_everywhere(), torch.tensor([0, LAST_WORD]))))
    assert NOISE_MIN < float(noise.min()) < NOISE_MIN + 0.1
    assert NOISE_MAX - 0.03 < float(noise.max()) < NOISE_MAX
    assert float(noise.max()) == pytest.approx(33 * math.log(2))  # w = 2^-33
    assert NOISE_MAX - NOISE_MIN < 27


def test_the_tail_distinguishes_single_words() -> None:
    """The 2^18 largest values are all different; uniforms of 24 bits would give 1024 values there."""
    noise = noise_from_words(torch.arange(1 << 18))
    assert bool((noise[1:] < noise[:-1]).all())


def test_the_top_of_a_flat_vocabulary_hardly_ever_ties() -> None:
    """In 50 draws of 128k words, the best beats even the next larger word; 24-bit uniforms tie in 0.8 % of draws."""
    generator = torch.Generator().manual_seed(2)
    smallest = [torch.randint(0, 1 << 32, (128_256,), generator=generator).amin() for _ in range(50)]
    second = torch.stack(smallest) + 1  # the closest rival: the next word
    assert bool((noise_from_words(torch.stack(smallest)) > noise_from_words(second)).all())


def test_the_distribution_is_gumbel() -> None:
    """Compares quantiles of 2^20 evenly spread words with exp(-exp(-g))."""
    words = torch.arange(1 << 20) * 4096 + 2048
    noise = noise_from_words(words).double().sort().values
    expected = torch.exp(-torch.exp(-noise))
    found = (torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20)
    assert float((expected - found).abs().max()) < 1e-6


def test_bits_are_pinned() -> None:
    """The noise of a seed is part of the product: other devices and later versions must repeat a run."""
    noise = noise_from_words(torch.tensor([0, 1, 12_345, 1 << 20, 1 << 28, 1 << 31, 3_000_000_000, LAST_WORD]))
    assert [f"{bits & 0xFFFFFFFF:08x}" for bits in noise.view(torch.int32).tolist()] == PINNED_NOISE
    words = torch.arange(1 << 20) * 4095 + 17
    assert int(noise_from_words(words).view(torch.int32).to(torch.int64).sum()) == PINNED_SUM


def test_bits_depend_only_on_the_word() -> None:
    """They do not depend on length, alignment, stride or shape, which decide the library loop that computes an
    element."""
    words = words_everywhere()[:4096]
    whole = noise_from_words(words)
    for offset, length in [(0, 1), (1, 3), (3, 17), (5, 1000), (7, 4000), (4095, 1)]:
        assert torch.equal(noise_from_words(words[offset : offset + length].clone()), whole[offset : offset + length])
        assert torch.equal(noise_from_words(words[offset : offset + length]), whole[offset : offset + length])
    assert torch.equal(noise_from_words(words[::3]), whole[::3])
    assert torch.equal(noise_from_words(words.view(64, 64).T), whole.view(64, 64).T)


@pytest.mark.parametrize(("first_token_id", "num_tokens"), [(0, 1), (0, 8), (1, 2), (3, 1), (6, 131), (32_064, 77)])
def test_ranges_and_single_tokens_agree(first_token_id: int, num_tokens: int) -> None:
    seeds, samples, positions = torch.tensor([7, -8, 7]), torch.tensor([0, 3, 0]), torch.tensor([5, 6, 7])
    in_range = gumbel_noise_range(seeds, samples, positions, first_token_id=first_token_id, num_tokens=num_tokens)
    assert in_range.shape == (3, num_tokens)
    for row in range(3):
        for column in {0, num_tokens // 2, num_tokens - 1}:
            single = gumbel_noise(seeds[row], samples[row], positions[row], torch.tensor(first_token_id + column))
            assert torch.equal(single, in_range[row, column])


def test_every_part_of_the_key_matters() -> None:
    base = (torch.tensor([7]), torch.tensor([0]), torch.tensor([5]))
    others = [
        (torch.tensor([8]), base[1], base[2]),
        (torch.tensor([7 + (1 << 32)]), base[1], base[2]),
        (base[0], torch.tensor([1]), base[2]),
        (base[0], base[1], torch.tensor([6])),
    ]
    noise = [gumbel_noise_range(*keys, first_token_id=0, num_tokens=1000).squeeze(0) for keys in [base, *others]]
    correlation = torch.corrcoef(torch.stack(noise)) - torch.eye(5)
    assert float(correlation.abs().max()) < 0.15
