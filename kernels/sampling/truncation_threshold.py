"""The threshold that min-p, top-k and top-p set together on each row of a whole vocabulary.

A threshold is the largest value above which there are enough tokens, by number or by mass. Bisection over the bits of
the value finds it without a sort. Counts and masses are integers, so the result is the same in every order. The kernels
first find a lower bound of the threshold, then collect the tokens above it, usually a few hundred, and bisect among
these.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.gumbel import EXACT
from kernels.sampling.noise_keys import scale_by_temperature
from kernels.sampling.probability_mass import probability_mass_jit, total_mass_reference
from kernels.sampling.sort_key import from_ordered_jit, ordered_jit
from kernels.sampling.tile import check_logits, check_row_values, divisor_jit, scaled_jit
from kernels.sampling.truncation import Candidates, Truncation, min_p_top_k_threshold, top_p_threshold

TILE = 4096  # tokens of a program
_PART_TOKENS = 128  # whose largest gives a lower bound of the k-th largest
BLOCK = 2048  # collected tokens processed together
_CPU_CANDIDATES = 512  # of a row with top-p; a nucleus is rarely larger, and for one that is, the whole row is sorted
_MAX_CPU_CANDIDATES = 2048

_MARGIN = tl.constexpr(0.1)  # in log space, far larger than the error of a hardware logarithm
_SMALLEST_REST = tl.constexpr(1e-9)


@triton.jit
def _biased_jit(values):
    """fp32 without NaN -> uint32 of the same order."""
    return ordered_jit(values).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _from_biased_jit(biased):
    return from_ordered_jit((biased ^ 0x80000000).to(tl.int32, bitcast=True))


@triton.jit
def part_maxima_kernel(
    maxima_ptr,  # fp32 [num_rows, num_parts], num_parts a multiple of those of a tile
    logits_ptr,
    temperature_ptr,
    num_tokens,
    row_stride,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.program_id(1) * (TILE // PART) + tl.arange(0, TILE // PART)
    columns = parts[:, None] * PART + tl.arange(0, PART)[None, :]
    divisor = divisor_jit(tl.load(temperature_ptr + row))
    scaled = scaled_jit(logits_ptr + row * row_stride, columns, num_tokens, divisor, -float("inf"))
    tl.store(maxima_ptr + row * tl.num_programs(1) * (TILE // PART) + parts, tl.max(scaled, axis=1))


@triton.jit(do_not_specialize_on_alignment=["largest_ptr"])
def lower_bound_kernel(
    bounds_ptr,
    largest_ptr,
    maxima_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    num_tokens,
    num_parts,
    BLOCK: tl.constexpr,
):
    """A lower bound of the threshold of a row, and the row's largest scaled logit."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    maxima = tl.load(maxima_ptr + row * num_parts + part, mask=part < num_parts, other=-float("inf"))
    largest = tl.max(maxima, axis=0)
    bound = largest + tl.load(log_min_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    if top_k > 0:
        if top_k <= num_parts:
            # The k-th largest of some tokens is not above the k-th largest of all.
            keys = _biased_jit(maxima)
            found = tl.full((), 0, tl.uint32)
            bit = tl.full((), 0x80000000, tl.uint32)
            while bit > 0:
                above = tl.sum((keys >= (found | bit)).to(tl.int32), axis=0)
                found = tl.where(above >= top_k, found | bit, found)
                bit = bit >> 1
            bound = tl.maximum(bound, _from_biased_jit(found))
    else:
        # All tokens below largest + log(rest / num_tokens) together have less than rest = 1 - top_p of the mass.
        rest = (1.0 - tl.load(top_p_ptr + row)).to(tl.float32)
        if rest > _SMALLEST_REST:
            bound = tl.maximum(bound, largest + tl.log(rest / num_tokens) - _MARGIN)
    tl.store(bounds_ptr + row, bound)
    tl.store(largest_ptr + row, largest)


@triton.jit(do_not_specialize_on_alignment=["totals_ptr", "largest_ptr"])
def collect_kernel(
    collected_ptr,  # fp32 [num_rows, num_tokens], in any order
    counts_ptr,  # int64 [num_rows], zeros
    totals_ptr,  # int64 [num_rows], zeros; the mass that min-p leaves, of rows with top-p and without top-k
    logits_ptr,
    temperature_ptr,
    bounds_ptr,
    largest_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    num_tokens,
    row_stride,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    divisor = divisor_jit(tl.load(temperature_ptr + row))
    scaled = scaled_jit(logits_ptr + row * row_stride, columns, num_tokens, divisor, -float("inf"))
    taken = (scaled >= tl.load(bounds_ptr + row)) & (scaled > -float("inf"))
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    num_taken = tl.sum(taken.to(tl.int32), axis=0)
    if num_taken > 0:
        start = tl.atomic_add(counts_ptr + row, num_taken.to(tl.int64), sem="relaxed")
        tl.store(collected_ptr + row * num_tokens + start + place, scaled, mask=taken)
    if (tl.load(top_k_ptr + row) == 0) & (tl.load(top_p_ptr + row) < 1):
        largest = tl.load(largest_ptr + row)
        floor = largest + tl.load(log_min_p_ptr + row)
        mass = tl.where(scaled >= floor, probability_mass_jit(scaled, largest), 0)
        tl.atomic_add(totals_ptr + row, tl.sum(mass, axis=0), sem="relaxed")


@triton.jit
def _sum_above_jit(collected_ptr, count, key, largest, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the collected tokens are not below a key, or their mass: int64."""
    total = tl.full((), 0, tl.int64)
    start = tl.full((), 0, tl.int64)
    while start < count:
        place = start + tl.arange(0, BLOCK)
        values = tl.load(collected_ptr + place, mask=place < count, other=-float("inf"))
        amount = tl.full((BLOCK,), 1, tl.int64)
        if MASS:
            amount = probability_mass_jit(values, largest)
        total += tl.sum(tl.where((place < count) & (_biased_jit(values) >= key), amount, 0), axis=0)
        start += BLOCK
    return total


@triton.jit
def _largest_key_jit(collected_ptr, count, wanted, largest, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that enough of the collected tokens are not below it."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    while bit > 0:
        above = _sum_above_jit(collected_ptr, count, found | bit, largest, MASS, BLOCK)
        found = tl.where(above >= wanted, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize_on_alignment=["totals_ptr", "largest_ptr"])
def threshold_kernel(
    thresholds_ptr,
    collected_ptr,
    counts_ptr,
    totals_ptr,
    largest_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    num_tokens,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    collected_ptr += row * num_tokens
    count = tl.load(counts_ptr + row)
    largest = tl.load(largest_ptr + row)
    threshold = largest + tl.load(log_min_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k <= count):
        key = _largest_key_jit(collected_ptr, count, top_k, largest, False, BLOCK)
        threshold = tl.maximum(threshold, _from_biased_jit(key))
    top_p = tl.load(top_p_ptr + row)
    if (top_p < 1) & (count > 0):
        total = tl.load(totals_ptr + row)
        if top_k > 0:  # everything left was collected
            total = _sum_above_jit(collected_ptr, count, _biased_jit(threshold), largest, True, BLOCK)
        share = top_p * total.to(tl.float64)
        wanted = share.to(tl.int64)
        wanted = tl.where(wanted.to(tl.float64) < share, wanted + 1, wanted)
        key = _largest_key_jit(collected_ptr, count, wanted, largest, True, BLOCK)
        threshold = tl.maximum(threshold, _from_biased_jit(key))
    tl.store(thresholds_ptr + row, threshold)


def _threshold_triton(logits: Tensor, temperature: Tensor, truncation: Truncation) -> Tensor:
    num_rows, num_tokens = logits.shape
    device = logits.device
    num_tiles = triton.cdiv(num_tokens, TILE)
    num_parts = num_tiles * (TILE // _PART_TOKENS)
    maxima = torch.empty((num_rows, num_parts), device=device)
    bounds, largest = torch.empty((2, num_rows), device=device)
    thresholds = torch.empty((num_rows,), device=device)
    counts, totals = torch.zeros((2, num_rows), dtype=torch.int64, device=device)
    collected = torch.empty((num_rows, num_tokens), device=device)
    settings = (truncation.log_min_p, truncation.top_k, truncation.top_p)
    stride = logits.stride(0)
    if num_rows == 0:
        return thresholds
    grid = (num_rows, num_tiles)
    part_maxima_kernel[grid](maxima, logits, temperature, num_tokens, stride, TILE=TILE, PART=_PART_TOKENS, num_warps=8)
    block = triton.next_power_of_2(num_parts)
    lower_bound_kernel[(num_rows,)](bounds, largest, maxima, *settings, num_tokens, num_parts, BLOCK=block)
    collect_kernel[grid](
        collected,
        counts,
        totals,
        logits,
        temperature,
        bounds,
        largest,
        *settings,
        num_tokens,
        stride,
        TILE=TILE,
        num_warps=8,
        **EXACT,
    )
    threshold_kernel[(num_rows,)](
        thresholds, collected, counts, totals, largest, *settings, num_tokens, BLOCK=BLOCK, num_warps=8, **EXACT
    )
    return thresholds


def truncation_threshold(logits: Tensor, temperature: Tensor, truncation: Truncation) -> Tensor:
    """The scaled logit below which a token is excluded.

    Args:
        logits: fp32 [num_rows, num_tokens], the whole vocabulary, rows without gaps; -Inf excludes a token; the
            result of a row with NaN is void.
        temperature: fp32 [num_rows]; 0 counts as 1.
        truncation: settings of each row.
    Returns:
        fp32 [num_rows]; -Inf where all stay.
    """
    check_logits(logits)
    check_row_values(logits, torch.float32, temperature=temperature, log_min_p=truncation.log_min_p)
    check_row_values(logits, torch.int64, top_k=truncation.top_k)
    check_row_values(logits, torch.float64, top_p=truncation.top_p)
    if runs_triton(logits):
        return _threshold_triton(logits, temperature, truncation)
    return _threshold_cpu(scale_by_temperature(logits, temperature), truncation)


def _threshold_cpu(scaled: Tensor, truncation: Truncation) -> Tensor:
    """Uses the largest logits, and all logits for rows that these do not settle."""
    num_candidates = max(truncation.max_top_k, _CPU_CANDIDATES if truncation.has_top_p else 1)
    num_candidates = min(num_candidates, _MAX_CPU_CANDIDATES, scaled.shape[1])
    thresholds, covered = _threshold_from(scaled, truncation, num_candidates)
    open_rows = (~covered).nonzero().squeeze(1)
    if open_rows.numel():
        thresholds[open_rows] = truncation_threshold_reference(scaled[open_rows], truncation.select(open_rows))
    return thresholds


def truncation_threshold_reference(scaled: Tensor, truncation: Truncation) -> Tensor:
    """`truncation_threshold` of scaled logits, by sorting them all."""
    return _threshold_from(scaled, truncation, scaled.shape[1])[0]


def _threshold_from(scaled: Tensor, truncation: Truncation, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Thresholds [num_rows] from this many candidates, and which of them are proven."""
    values = scaled.topk(num_candidates, dim=1).values
    complete = num_candidates == scaled.shape[1]
    candidates = Candidates(
        values=values, rest=torch.full_like(values[:, -1], -torch.inf) if complete else values[:, -1]
    )
    thresholds, covered = min_p_top_k_threshold(candidates, truncation)
    if truncation.has_top_p:
        mass = total_mass_reference(scaled, values[:, 0], thresholds)
        thresholds, top_p_covered = top_p_threshold(candidates, truncation, thresholds, mass)
        covered = covered & top_p_covered
    return thresholds, covered
