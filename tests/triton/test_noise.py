"""Random words and noise inside a kernel have the bits of the references."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.sampling.gumbel import (
    EXACT,
    gumbel_noise_jit,
    gumbel_noise_range,
    noise_bounds_jit,
    noise_from_words,
    noise_from_words_jit,
)

BLOCK = 1 << 16


@triton.jit
def noise_kernel(noise_ptr, low_ptr, high_ptr, words_ptr, num_words, BLOCK: tl.constexpr):
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = word < num_words
    words = tl.load(words_ptr + word, mask=inside, other=0).to(tl.uint32)
    low, high = noise_bounds_jit(words)
    tl.store(noise_ptr + word, noise_from_words_jit(words), mask=inside)
    tl.store(low_ptr + word, low, mask=inside)
    tl.store(high_ptr + word, high, mask=inside)


@triton.jit
def token_noise_kernel(noise_ptr, keys_ptr, first_token_id, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    seed, sample_index = tl.load(keys_ptr + row * 3), tl.load(keys_ptr + row * 3 + 1)
    token = tl.arange(0, BLOCK)
    noise = gumbel_noise_jit(seed, sample_index, tl.load(keys_ptr + row * 3 + 2), first_token_id + token)
    tl.store(noise_ptr + row * BLOCK + token, noise)


def words_everywhere() -> Tensor:
    """Random words of every magnitude, and all of the smallest and largest."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(0, 1 << 32, (300_000,), generator=generator)
    log_uniform = (2.0 ** (32 * torch.rand(300_000, generator=generator, dtype=torch.float64))).long() - 1
    ends = torch.arange(100_000)
    return torch.cat((uniform, log_uniform, ends, (1 << 32) - 1 - ends))


def test_noise_has_the_bits_of_the_reference_and_lies_within_its_bounds(device: torch.device) -> None:
    words = words_everywhere()
    noise, low, high = torch.empty((3, len(words)), device=device)
    grid = (triton.cdiv(len(words), BLOCK),)
    noise_kernel[grid](noise, low, high, words.to(device), len(words), BLOCK=BLOCK, **EXACT)
    assert torch.equal(noise.cpu(), noise_from_words(words))
    assert bool((low <= noise).all())
    assert bool((noise <= high).all())
    assert float((high - low)[noise > 4].max()) < 0.1  # the bounds are close where a winner lies


def test_words_depend_on_all_of_seed_sample_position_and_token(device: torch.device) -> None:
    keys = torch.tensor(
        [[0, 0, 0], [1, 0, 0], [-1, 2, 131_071], [(1 << 63) - 1, 7, 5], [-(1 << 63), 0, 1], [1 << 40, 1, (1 << 31) + 9]]
    )
    noise = torch.empty((len(keys), 512), device=device)
    for first_token_id in (0, 1, 130_003):
        token_noise_kernel[(len(keys),)](noise, keys.to(device), first_token_id, BLOCK=512, **EXACT)
        seeds, samples, positions = keys.T
        expected = gumbel_noise_range(seeds, samples, positions, first_token_id=first_token_id, num_tokens=512)
        assert torch.equal(noise.cpu(), expected)
