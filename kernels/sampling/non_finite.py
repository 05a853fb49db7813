"""Finds rows of logits with NaN or Inf. No model should produce them, but one such row must not affect the others."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.tile import NUM_WARPS, check_logits, tile_for


@triton.jit
def non_finite_kernel(found_ptr, logits_ptr, num_tokens, row_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * row_stride + columns, mask=columns < num_tokens, other=0.0)
    if tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, axis=0) > 0:  # the comparison is false for NaN
        tl.store(found_ptr + row, 1)


def screen(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the rows that are not finite.

    Args:
        logits: fp32 [num_rows, num_tokens], rows without gaps.
    Returns:
        logits: the given logits if the kernels of this folder tolerate such rows, else with zeros in those rows.
        non_finite: bool [num_rows].
    """
    check_logits(logits)
    if runs_triton(logits):
        return logits, _non_finite_triton(logits)
    non_finite = non_finite_reference(logits)
    return (logits.masked_fill(non_finite.unsqueeze(1), 0.0) if non_finite.any() else logits), non_finite


def _non_finite_triton(logits: Tensor) -> Tensor:
    num_rows, num_tokens = logits.shape
    found = torch.zeros((num_rows,), dtype=torch.uint8, device=logits.device)
    tile = tile_for(num_rows, num_tokens)
    if num_rows:
        grid = (num_rows, triton.cdiv(num_tokens, tile))
        non_finite_kernel[grid](found, logits, num_tokens, logits.stride(0), TILE=tile, num_warps=NUM_WARPS[tile])
    return found.view(torch.bool)


def non_finite_reference(logits: Tensor) -> Tensor:
    """bool [num_rows]. NaN shows in the extremes, which are much faster to find than testing each logit."""
    return ~(logits.amin(dim=1).isfinite() & logits.amax(dim=1).isfinite())
