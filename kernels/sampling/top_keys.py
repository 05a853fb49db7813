"""The best few tokens of each row of logits, as sort keys (kernels/sampling/sort_key.py)."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.sampling.gumbel import EXACT, noise_from_words_jit
from kernels.sampling.noise_keys import NoiseKeys
from kernels.sampling.philox import token_words_jit
from kernels.sampling.sample_cpu import top_keys_cpu
from kernels.sampling.sort_key import EXCLUDED_KEY, pack_sort_key, pack_sort_key_jit, unpack_sort_key
from kernels.sampling.tile import (
    NUM_WARPS,
    check_logits,
    divisor_jit,
    num_tiles_of,
    scaled_jit,
    tile_for,
    token_ids_jit,
)

_EXCLUDED_KEY = tl.constexpr(EXCLUDED_KEY)
_ABOVE_ALL = tl.constexpr((1 << 63) - 1)
NUM_MERGED = (4, 32, 512, 1024)  # tokens of a tile for which there is a kernel that merges tiles


@triton.jit
def _key_jit(values, columns, num_tokens, first_token_id):
    keys = pack_sort_key_jit(values, token_ids_jit(columns, num_tokens, first_token_id))
    return tl.where(values > -float("inf"), keys, _EXCLUDED_KEY)


@triton.jit
def _below_jit(keys, last):
    return tl.where(keys < last, keys, _EXCLUDED_KEY)


@triton.jit(do_not_specialize=["num"])
def top_of_tiles_kernel(
    top_ptr,  # int64 [num_rows, num_tiles, num]
    logits_ptr,
    temperature_ptr,
    thresholds_ptr,
    seeds_ptr,
    sample_indices_ptr,
    positions_ptr,
    num_tokens,
    first_token_id,
    row_stride,
    num,
    HAS_NOISE: tl.constexpr,  # else the plain order of the logits
    HAS_THRESHOLDS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = 0.0
    if HAS_NOISE:
        temperature = tl.load(temperature_ptr + row)
    divisor = divisor_jit(temperature)
    threshold = -float("inf")
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    groups = (first_token_id >> 2) + tl.program_id(1) * (TILE // 4) + tl.arange(0, TILE // 4)
    columns = groups * 4 - first_token_id
    v0 = scaled_jit(row_ptr, columns, num_tokens, divisor, threshold)
    v1 = scaled_jit(row_ptr, columns + 1, num_tokens, divisor, threshold)
    v2 = scaled_jit(row_ptr, columns + 2, num_tokens, divisor, threshold)
    v3 = scaled_jit(row_ptr, columns + 3, num_tokens, divisor, threshold)
    if HAS_NOISE:  # noqa: SIM102 - decided by the compiler, the other by each row
        if temperature > 0:
            seed = tl.load(seeds_ptr + row)
            sample_index = tl.load(sample_indices_ptr + row)
            position = tl.load(positions_ptr + row)
            w0, w1, w2, w3 = token_words_jit(seed, sample_index, position, groups)
            v0 += noise_from_words_jit(w0)
            v1 += noise_from_words_jit(w1)
            v2 += noise_from_words_jit(w2)
            v3 += noise_from_words_jit(w3)
    k0 = _key_jit(v0, columns, num_tokens, first_token_id)
    k1 = _key_jit(v1, columns + 1, num_tokens, first_token_id)
    k2 = _key_jit(v2, columns + 2, num_tokens, first_token_id)
    k3 = _key_jit(v3, columns + 3, num_tokens, first_token_id)
    top_ptr += (row * tl.num_programs(1) + tl.program_id(1)) * num
    last = tl.full((), _ABOVE_ALL, tl.int64)
    rank = 0
    while rank < num:
        left = tl.maximum(
            tl.maximum(_below_jit(k0, last), _below_jit(k1, last)),
            tl.maximum(_below_jit(k2, last), _below_jit(k3, last)),
        )
        last = tl.max(left, axis=0)
        tl.store(top_ptr + rank, last)
        rank += 1


@triton.jit(do_not_specialize=["num", "num_candidates"])
def top_of_rows_kernel(top_ptr, tile_top_ptr, num, num_candidates, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK)
    keys = tl.load(
        tile_top_ptr + row * num_candidates + candidate, mask=candidate < num_candidates, other=_EXCLUDED_KEY
    )
    last = tl.full((), _ABOVE_ALL, tl.int64)
    rank = 0
    while rank < num:
        last = tl.max(_below_jit(keys, last), axis=0)
        tl.store(top_ptr + row * num + rank, last)
        rank += 1


def top_keys_triton(
    logits: Tensor,
    num: int,
    *,
    first_token_id: int = 0,
    temperature: Tensor | None = None,
    keys: NoiseKeys | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """Sort keys int64 [num_rows, num], best first, EXCLUDED_KEY after the last token. Temperature and noise apply only
    if `temperature` and `keys` are given."""
    num_rows, num_tokens = logits.shape
    tile = tile_for(num_rows, num_tokens)
    num_tiles = num_tiles_of(num_tokens, first_token_id, tile)
    tile_top = torch.empty((num_rows, num_tiles, num), dtype=torch.int64, device=logits.device)
    top = torch.empty((num_rows, num), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return top
    top_of_tiles_kernel[(num_rows, num_tiles)](
        tile_top,
        logits,
        temperature,
        thresholds,
        None if keys is None else keys.seeds,
        None if keys is None else keys.sample_indices,
        None if keys is None else keys.positions,
        num_tokens,
        first_token_id,
        logits.stride(0),
        num,
        HAS_NOISE=keys is not None,
        HAS_THRESHOLDS=thresholds is not None,
        TILE=tile,
        num_warps=NUM_WARPS[tile],
        **EXACT,
    )
    num_candidates = num_tiles * num
    block = triton.next_power_of_2(num_tiles * next((most for most in NUM_MERGED if most >= num), num))
    top_of_rows_kernel[(num_rows,)](
        top, tile_top, num, num_candidates, BLOCK=block, num_warps=min(max(block // 256, 1), 16)
    )
    return top


def top_sort_keys(values: Tensor, num: int, *, first_token_id: int = 0) -> Tensor:
    """Sort keys of the tokens with the largest values, best first, the lowest id first among equals.

    Args:
        values: fp32 [num_rows, num_tokens], rows without gaps; -Inf excludes a token; void for NaN.
        num: a small number; the kernel's time grows with it.
        first_token_id: the token of column 0.
    Returns:
        int64 [num_rows, num]; EXCLUDED_KEY where a row has no more tokens.
    """
    check_logits(values)
    if runs_triton(values):
        return top_keys_triton(values, num, first_token_id=first_token_id)
    greedy = torch.zeros(values.shape[0])
    return top_keys_cpu(values, greedy, None, num=num, first_token_id=first_token_id, thresholds=None)


def top_values(values: Tensor, num: int) -> Tensor:
    """The `num` largest values of each row, fp32 [num_rows, num_tokens] -> [num_rows, num], descending.

    num is at most num_tokens; rows without gaps; the result of a row with NaN is void.
    """
    check_logits(values)
    if runs_triton(values):
        return unpack_sort_key(top_keys_triton(values, num))[0]
    return values.topk(num, dim=1).values


def top_sort_keys_reference(values: Tensor, num: int, *, first_token_id: int = 0) -> Tensor:
    """`top_sort_keys` by sorting everything. No two keys are equal, so the result does not depend on ties."""
    num_tokens = values.shape[1]
    token_ids = torch.arange(first_token_id, first_token_id + num_tokens, device=values.device)
    sort_keys = pack_sort_key(values, token_ids).masked_fill(values == -torch.inf, EXCLUDED_KEY)
    sort_keys = torch.nn.functional.pad(sort_keys, (0, max(0, num - num_tokens)), value=EXCLUDED_KEY)
    return sort_keys.sort(dim=1, descending=True).values[:, :num]
