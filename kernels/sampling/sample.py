"""Chooses one token for each row of logits, with noise that depends only on (seed, sample, position, token).

The token is argmax_v(logits_v / temperature + noise_v), the lowest id among equals, with Gumbel noise
(kernels/sampling/gumbel.py). This is an exact draw from softmax(logits / temperature), and equal logits give the same
token in every model and batch. At temperature 0 it is the plain argmax.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.native.sampling import can_choose, native_choose
from kernels.sampling.gumbel import EXACT, gumbel_noise_jit, gumbel_noise_range, noise_bounds_jit, noise_from_words_jit
from kernels.sampling.noise_keys import NoiseKeys, row_settings, scale_by_temperature
from kernels.sampling.philox import token_words_jit
from kernels.sampling.sample_cpu import sample_cpu
from kernels.sampling.sort_key import pack_sort_key_jit, unpack_sort_key_jit
from kernels.sampling.tile import (
    NUM_WARPS,
    check_logits,
    check_row_values,
    divisor_jit,
    num_tiles_of,
    scaled_jit,
    tile_for,
    token_ids_jit,
)


@triton.jit
def _best_of_jit(v0, v1, v2, v3, columns, num_tokens, first_token_id):
    """The largest sort key of a tile's values."""
    k0 = pack_sort_key_jit(v0, token_ids_jit(columns, num_tokens, first_token_id))
    k1 = pack_sort_key_jit(v1, token_ids_jit(columns + 1, num_tokens, first_token_id))
    k2 = pack_sort_key_jit(v2, token_ids_jit(columns + 2, num_tokens, first_token_id))
    k3 = pack_sort_key_jit(v3, token_ids_jit(columns + 3, num_tokens, first_token_id))
    return tl.max(tl.maximum(tl.maximum(k0, k1), tl.maximum(k2, k3)), axis=0)


@triton.jit
def sample_tiles_kernel(
    best_ptr,  # int64 [num_rows, num_tiles], sort keys
    logits_ptr,
    temperature_ptr,
    thresholds_ptr,
    seeds_ptr,
    sample_indices_ptr,
    positions_ptr,
    num_tokens,
    first_token_id,
    row_stride,
    HAS_THRESHOLDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The best token of a tile. Bounds of the noise cost a tenth as much and nearly always leave one candidate, so the
    exact noise is computed for that one alone."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    divisor = divisor_jit(temperature)
    threshold = -float("inf")
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    groups = (first_token_id >> 2) + tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)
    columns = groups * 4 - first_token_id
    s0 = scaled_jit(row_ptr, columns, num_tokens, divisor, threshold)
    s1 = scaled_jit(row_ptr, columns + 1, num_tokens, divisor, threshold)
    s2 = scaled_jit(row_ptr, columns + 2, num_tokens, divisor, threshold)
    s3 = scaled_jit(row_ptr, columns + 3, num_tokens, divisor, threshold)
    largest = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), axis=0)
    if (temperature > 0) & (largest > -float("inf")):
        seed = tl.load(seeds_ptr + row)
        sample_index = tl.load(sample_indices_ptr + row)
        position = tl.load(positions_ptr + row)
        w0, w1, w2, w3 = token_words_jit(seed, sample_index, position, groups)
        low0, high0 = noise_bounds_jit(w0)
        low1, high1 = noise_bounds_jit(w1)
        low2, high2 = noise_bounds_jit(w2)
        low3, high3 = noise_bounds_jit(w3)
        # Rounding is monotone: a token that cannot reach this value cannot even tie with the one that has it.
        certain = tl.max(tl.maximum(tl.maximum(s0 + low0, s1 + low1), tl.maximum(s2 + low2, s3 + low3)), axis=0)
        c0 = (s0 + high0 >= certain).to(tl.int32)
        c1 = (s1 + high1 >= certain).to(tl.int32)
        c2 = (s2 + high2 >= certain).to(tl.int32)
        c3 = (s3 + high3 >= certain).to(tl.int32)
        if tl.sum(c0 + c1 + c2 + c3, axis=0) == 1:
            column = tl.sum((c0 + c1 + c2 + c3) * columns + c1 + 2 * c2 + 3 * c3, axis=0)
            value = scaled_jit(row_ptr, column, num_tokens, divisor, threshold)
            value += gumbel_noise_jit(seed, sample_index, position, column + first_token_id)
            best = pack_sort_key_jit(value, column + first_token_id)
        else:
            v0, v1 = s0 + noise_from_words_jit(w0), s1 + noise_from_words_jit(w1)
            v2, v3 = s2 + noise_from_words_jit(w2), s3 + noise_from_words_jit(w3)
            best = _best_of_jit(v0, v1, v2, v3, columns, num_tokens, first_token_id)
    else:
        best = _best_of_jit(s0, s1, s2, s3, columns, num_tokens, first_token_id)
    tl.store(best_ptr + row * tl.num_programs(1) + tl.program_id(1), best)


@triton.jit
def best_tile_kernel(values_ptr, token_ids_ptr, best_ptr, num_tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    # If there are no more tiles, the last one repeats.
    best = tl.max(tl.load(best_ptr + row * num_tiles + tl.minimum(tile, num_tiles - 1)), axis=0)
    value, token_id = unpack_sort_key_jit(best)
    tl.store(values_ptr + row, value)
    tl.store(token_ids_ptr + row, token_id)


def _sample_triton(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int, thresholds: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_rows, num_tokens = logits.shape
    tile = tile_for(num_rows, num_tokens)
    num_tiles = num_tiles_of(num_tokens, first_token_id, tile)
    best = torch.empty((num_rows, num_tiles), dtype=torch.int64, device=logits.device)
    values = torch.empty((num_rows,), dtype=torch.float32, device=logits.device)
    token_ids = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return values, token_ids
    sample_tiles_kernel[(num_rows, num_tiles)](
        best,
        logits,
        temperature,
        temperature if thresholds is None else thresholds,
        keys.seeds,
        keys.sample_indices,
        keys.positions,
        num_tokens,
        first_token_id,
        logits.stride(0),
        HAS_THRESHOLDS=thresholds is not None,
        TILE=tile,
        num_warps=NUM_WARPS[tile],
        **EXACT,
    )
    best_tile_kernel[(num_rows,)](values, token_ids, best, num_tiles, BLOCK=triton.next_power_of_2(num_tiles))
    return values, token_ids


def sample(
    logits: Tensor,
    temperature: Tensor,
    keys: NoiseKeys,
    *,
    first_token_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a token in each row of a vocabulary or of a shard of it.

    Args:
        logits: fp32 [num_rows, num_tokens], rows without gaps; -Inf excludes a token; void for NaN.
        temperature: fp32 [num_rows]; 0 is greedy.
        keys: of the noise, contiguous.
        first_token_id: the token of column 0.
        thresholds: fp32 [num_rows]; tokens with a scaled logit below it are excluded (kernels/sampling/truncation.py).
    Returns:
        values: fp32 [num_rows], scaled logit plus noise of the winner; -Inf where every token is excluded.
        token_ids: int64 [num_rows]; first_token_id if every token is excluded. Over the shards of a vocabulary,
            the choice is the token with the largest value, of equal ones the lowest id.
    """
    check_arguments(logits, temperature, keys, thresholds)
    if runs_triton(logits):
        return _sample_triton(logits, temperature, keys, first_token_id=first_token_id, thresholds=thresholds)
    if can_choose(logits):
        settings = row_settings(temperature, keys, thresholds)
        values, token_ids = native_choose(logits, settings, num=1, first_token_id=first_token_id)
        return values.squeeze(1), token_ids.squeeze(1)
    return sample_cpu(logits, temperature, keys, first_token_id=first_token_id, thresholds=thresholds)


def check_arguments(logits: Tensor, temperature: Tensor, keys: NoiseKeys, thresholds: Tensor | None) -> None:
    """Raises ValueError naming what does not fit."""
    check_logits(logits)
    check_row_values(logits, torch.float32, temperature=temperature, thresholds=thresholds)
    check_row_values(
        logits, torch.int64, seeds=keys.seeds, sample_indices=keys.sample_indices, positions=keys.positions
    )


def noisy_logits_reference(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, first_token_id: int, thresholds: Tensor | None
) -> Tensor:
    """What is compared: scaled logit plus noise of every token, -Inf if it is excluded. [num_rows, num_tokens]"""
    noise = gumbel_noise_range(
        keys.seeds, keys.sample_indices, keys.positions, first_token_id=first_token_id, num_tokens=logits.shape[1]
    )
    scaled = scale_by_temperature(logits, temperature)
    if thresholds is not None:
        scaled = scaled.masked_fill(scaled < thresholds.unsqueeze(1), -torch.inf)
    return scaled + torch.where((temperature > 0).unsqueeze(1), noise, 0.0)


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    keys: NoiseKeys,
    *,
    first_token_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample` in its simplest form: noise for every token."""
    best = noisy_logits_reference(logits, temperature, keys, first_token_id, thresholds).max(dim=1)
    return best.values, best.indices + first_token_id  # documented to be the first of equal maxima
