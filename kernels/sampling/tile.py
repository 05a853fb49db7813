"""How the kernels over rows of logits cut a row into tiles and read a tile.

A tile starts at a multiple of four tokens, because one call of Philox serves four. Its tokens are held as four blocks:
block j holds token 4g + j of each group g.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

TILE = 4096  # tokens per program: 16 for each of 256 threads
SMALL_TILE = 1024
NUM_WARPS = {TILE: 8, SMALL_TILE: 4}
ENOUGH_PROGRAMS = 1024  # a few for each multiprocessor


def tile_for(num_rows: int, num_tokens: int) -> int:
    """Tokens per tile: with few rows, tiles are smaller, to fill a device. No result depends on it."""
    return TILE if num_rows * num_tokens >= TILE * ENOUGH_PROGRAMS else SMALL_TILE


def num_tiles_of(num_tokens: int, first_token_id: int, tile: int) -> int:
    return -(-(first_token_id % 4 + num_tokens) // tile)


def check_logits(logits: Tensor) -> None:
    """Raises TypeError or ValueError if the kernels cannot read logits [num_rows, num_tokens]."""
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [num_rows, num_tokens] with a token at least, got {tuple(logits.shape)}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have rows without gaps, got strides {logits.stride()}: make them contiguous")


def check_row_values(logits: Tensor, dtype: torch.dtype, **values: Tensor | None) -> None:
    """Raises ValueError unless each of `values` is None or holds a contiguous number for each row of logits."""
    for name, x in values.items():
        if x is not None and (x.shape != logits.shape[:1] or x.dtype != dtype or not x.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous {dtype} [{logits.shape[0]}], got {x.dtype} {list(x.shape)} with strides "
                f"{list(x.stride())}"
            )


@triton.jit
def divisor_jit(temperature):
    """The divisor of the logits of a row with this temperature."""
    return tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def scaled_jit(row_ptr, columns, num_tokens, divisor, threshold):
    """Scaled logits; -Inf beyond the row, below the threshold and for NaN."""
    x = tl.load(row_ptr + columns, mask=(columns >= 0) & (columns < num_tokens), other=-float("inf"))
    if divisor != 1.0:
        x = tl.div_rn(x, divisor)
    return tl.where(x >= threshold, x, -float("inf"))


@triton.jit
def token_ids_jit(columns, num_tokens, first_token_id):
    """Token ids of columns. Columns after the end of the row get the id of the nearest column."""
    return tl.minimum(tl.maximum(columns, 0), num_tokens - 1) + first_token_id
