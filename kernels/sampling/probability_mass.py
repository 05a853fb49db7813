"""Probabilities as integers, so that a sum over a vocabulary is the same in every order, sharding and batch."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.gumbel import EXACT, LN2_HIGH, LN2_LOW
from kernels.sampling.tile import NUM_WARPS, check_logits, check_row_values, tile_for

MASS_BITS = 43  # exp(0) has mass 2^43: the masses of fewer than 2^20 tokens add up within int64
MAX_TOKENS = 1 << 20
_LOWEST_EXPONENT = -64.0  # exp(-64) * 2^43 is far below 1
_CACHED_LOGITS = 1 << 16
_LOG2_E = float.fromhex("0x1.715476p+0")
_EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # relative error below 1e-8


def probability_mass(logits: Tensor, largest: Tensor) -> Tensor:
    """exp(logits - largest) in units of 2^-43, rounded down.

    Uses separate fp32 operations as in kernels/sampling/gumbel.py, so the integers are the same on every device and at
    every position of a tensor (library exponentials differ between the vectorised body and the scalar tail of a
    tensor). Relative error below 2e-7; logits 30 or more below the largest have mass 0.

    Args:
        logits: fp32 [num_rows, num_tokens]; -Inf has mass 0; no NaN.
        largest: fp32 [num_rows], finite and not below any logit of its row.
    Returns:
        int64 [num_rows, num_tokens].
    """
    x = (logits - largest.unsqueeze(1)).clamp(min=_LOWEST_EXPONENT)
    n = (x * _LOG2_E + 0.5).floor()
    r = (x - n * LN2_HIGH) - n * LN2_LOW  # |r| <= log(2) / 2
    y = torch.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        y = y * r + coefficient
    scale = ((n.to(torch.int32) + (MASS_BITS + 127)) << 23).view(torch.float32)  # 2^(n + 43)
    return (y * scale).to(torch.int64)


_LN2_HIGH = tl.constexpr(LN2_HIGH)
_LN2_LOW = tl.constexpr(LN2_LOW)
_KERNEL_LOG2_E = tl.constexpr(_LOG2_E)
_KERNEL_LOWEST_EXPONENT = tl.constexpr(_LOWEST_EXPONENT)
_MASS_EXPONENT = tl.constexpr(MASS_BITS + 127)


@triton.jit
def probability_mass_jit(logits, largest):
    """`probability_mass` of a block of logits of one row; for launches with EXACT options."""
    x = tl.maximum(logits - largest, _KERNEL_LOWEST_EXPONENT)
    n = tl.floor(x * _KERNEL_LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = r * (1 / 5040) + 1 / 720
    y = y * r + 1 / 120
    y = y * r + 1 / 24
    y = y * r + 1 / 6
    y = y * r + 1 / 2
    y = y * r + 1.0
    y = y * r + 1.0
    scale = ((n.to(tl.int32) + _MASS_EXPONENT) << 23).to(tl.float32, bitcast=True)
    return (y * scale).to(tl.int64)


@triton.jit
def mass_and_rank_kernel(
    sums_ptr,  # int64 [2, num_rows], zeros
    logits_ptr,
    largest_ptr,
    thresholds_ptr,
    values_ptr,
    num_tokens,
    row_stride,
    HAS_THRESHOLDS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * row_stride + columns, mask=columns < num_tokens, other=-float("inf"))
    mass = probability_mass_jit(x, tl.load(largest_ptr + row))
    if HAS_THRESHOLDS:
        mass = tl.where(x >= tl.load(thresholds_ptr + row), mass, 0)
    num_better = (x > tl.load(values_ptr + row)).to(tl.int64)
    tl.atomic_add(sums_ptr + row, tl.sum(mass, axis=0), sem="relaxed")
    tl.atomic_add(sums_ptr + tl.num_programs(0) + row, tl.sum(num_better, axis=0), sem="relaxed")


def _mass_and_rank_triton(logits: Tensor, largest: Tensor, values: Tensor, thresholds: Tensor | None) -> Tensor:
    num_rows, num_tokens = logits.shape
    sums = torch.zeros((2, num_rows), dtype=torch.int64, device=logits.device)
    tile = tile_for(num_rows, num_tokens)
    if num_rows:
        mass_and_rank_kernel[(num_rows, triton.cdiv(num_tokens, tile))](
            sums,
            logits,
            largest,
            thresholds,
            values,
            num_tokens,
            logits.stride(0),
            HAS_THRESHOLDS=thresholds is not None,
            TILE=tile,
            num_warps=NUM_WARPS[tile],
            **EXACT,
        )
    return sums


def mass_and_rank(logits: Tensor, largest: Tensor, values: Tensor) -> Tensor:
    """The integers from which the log-softmax of one token per row follows. They add up over a vocabulary's shards.

    Args:
        logits: fp32 [num_rows, num_tokens], rows without gaps; -Inf has mass 0; the result of a row with NaN is void.
        largest: fp32 [num_rows], finite and not below any logit of its row.
        values: fp32 [num_rows], logits of the tokens in question.
    Returns:
        int64 [2, num_rows]: the sum of the masses of each row, and the number of logits above its value.
    """
    check_logits(logits)
    check_row_values(logits, torch.float32, largest=largest, values=values)
    if runs_triton(logits):
        return _mass_and_rank_triton(logits, largest, values, None)
    return mass_and_rank_reference(logits, largest, values)


def mass_and_rank_reference(logits: Tensor, largest: Tensor, values: Tensor) -> Tensor:
    return torch.stack((total_mass_reference(logits, largest), (logits > values.unsqueeze(1)).sum(dim=1)))


def total_mass(logits: Tensor, largest: Tensor, threshold: Tensor | None = None) -> Tensor:
    """The sum of the masses of each row; with a threshold, only of the logits not below it.

    fp32 [num_rows, num_tokens], [num_rows], [num_rows] -> int64 [num_rows].
    """
    check_logits(logits)
    check_row_values(logits, torch.float32, largest=largest, threshold=threshold)
    if runs_triton(logits):
        return _mass_and_rank_triton(logits, largest, largest, threshold)[0]
    return total_mass_reference(logits, largest, threshold)


def total_mass_reference(logits: Tensor, largest: Tensor, threshold: Tensor | None = None) -> Tensor:
    """`total_mass`. On CPU it takes few enough logits at a time that the temporaries stay in the cache."""
    num_rows, num_tokens = logits.shape
    width = max(1, _CACHED_LOGITS // max(1, num_rows)) if logits.device.type == "cpu" else num_tokens
    total = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    for part in torch.split(logits, width, dim=1):
        mass = probability_mass(part, largest)
        if threshold is not None:
            mass = torch.where(part >= threshold.unsqueeze(1), mass, 0)
        total += mass.sum(dim=1)
    return total
