"""The denominator of a softmax over a row or a shard of it, to be combined with those of other shards."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.noise_keys import scale_by_temperature
from kernels.sampling.tile import NUM_WARPS, check_logits, check_row_values, divisor_jit, scaled_jit, tile_for


@triton.jit
def _exponentials_jit(scaled, largest):
    """exp(scaled - largest), 0 where all are -Inf."""
    return tl.exp(scaled - tl.where(largest > -float("inf"), largest, 0.0))


@triton.jit(do_not_specialize_on_alignment=["sums_ptr"])
def tile_sums_kernel(
    largest_ptr,  # fp32 [num_rows, num_tiles]
    sums_ptr,  # fp32 [num_rows, num_tiles]
    logits_ptr,
    temperature_ptr,
    num_tokens,
    row_stride,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    divisor = divisor_jit(tl.load(temperature_ptr + row))
    scaled = scaled_jit(logits_ptr + row * row_stride, columns, num_tokens, divisor, -float("inf"))
    largest = tl.max(scaled, axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest_ptr + place, largest)
    tl.store(sums_ptr + place, tl.sum(_exponentials_jit(scaled, largest), axis=0))


@triton.jit(do_not_specialize_on_alignment=["totals_ptr", "tile_sums_ptr"])
def row_sums_kernel(largest_ptr, totals_ptr, tile_largest_ptr, tile_sums_ptr, num_tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    tile_largest = tl.load(tile_largest_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=-float("inf"))
    tile_sums = tl.load(tile_sums_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    largest = tl.max(tile_largest, axis=0)
    tl.store(largest_ptr + row, largest)
    tl.store(totals_ptr + row, tl.sum(_exponentials_jit(tile_largest, largest) * tile_sums, axis=0))


def softmax_sum(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the scaled logits of each row, and the sum of exp(scaled logit - largest).

    Args:
        logits: fp32 [num_rows, num_tokens], rows without gaps; -Inf excludes a token; the result for NaN is void.
        temperature: fp32 [num_rows]; 0 counts as 1.
    Returns:
        largest: fp32 [num_rows].
        total: fp32 [num_rows]; 0 where every token is excluded.
    """
    check_logits(logits)
    check_row_values(logits, torch.float32, temperature=temperature)
    if not runs_triton(logits):
        return softmax_sum_reference(logits, temperature)
    num_rows, num_tokens = logits.shape
    tile = tile_for(num_rows, num_tokens)
    num_tiles = triton.cdiv(num_tokens, tile)
    tile_largest, tile_sums = torch.empty((2, num_rows, num_tiles), device=logits.device)
    largest, totals = torch.empty((2, num_rows), device=logits.device)
    if num_rows:
        tile_sums_kernel[(num_rows, num_tiles)](
            tile_largest,
            tile_sums,
            logits,
            temperature,
            num_tokens,
            logits.stride(0),
            TILE=tile,
            num_warps=NUM_WARPS[tile],
        )
        block = triton.next_power_of_2(num_tiles)
        row_sums_kernel[(num_rows,)](largest, totals, tile_largest, tile_sums, num_tiles, BLOCK=block)
    return largest, totals


def softmax_sum_reference(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    scaled = scale_by_temperature(logits, temperature)
    largest = scaled.amax(dim=1)
    base = torch.where(largest == -torch.inf, 0.0, largest)
    return largest, (scaled - base.unsqueeze(1)).exp().sum(dim=1)
