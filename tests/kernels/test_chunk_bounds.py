"""The references of bounds and scores, compared with exact scores, and what the launchers refuse."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.upcoming import chunk_bounds as module
from kernels.upcoming.chunk_bounds import (
    chunk_bounds,
    chunk_bounds_reference,
    chunk_scores,
    chunk_scores_cpu,
    chunk_scores_reference,
)
from tests.helpers.compile_sm90 import compile_for_sm90
from tests.helpers.poisoned_cache import PoisonedCache, poisoned_cache

LENS = [0, 1, 3, 4, 5, 11, 12]


def exact_scores(q: Tensor, keys: Tensor) -> Tensor:
    """fp64 [seq_len, num_q_heads] of one seq."""
    group = q.shape[0] // keys.shape[1]
    return torch.einsum("hd,khd->kh", q.double(), keys.double().repeat_interleave(group, dim=1))


def greatest_exact_scores(q: Tensor, cache: PoisonedCache, chunk_size: int, num_chunks: int) -> Tensor:
    """fp64 [num_seqs, num_kv_heads, num_chunks]: the scores that the bounds must reach."""
    num_kv_heads = cache.k_cache.shape[2]
    greatest = torch.full((len(q), num_kv_heads, num_chunks), -torch.inf, dtype=torch.float64)
    for seq, keys in enumerate(cache.keys):
        scores = exact_scores(q[seq], keys).unflatten(1, (num_kv_heads, -1)).amax(2)
        for position, score in enumerate(scores):
            chunk = position // chunk_size
            greatest[seq, :, chunk] = torch.maximum(greatest[seq, :, chunk], score)
    return greatest


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 100])
def test_bounds_are_the_smallest_and_largest_keys_of_their_chunk(chunk_size: int) -> None:
    cache = poisoned_cache(LENS)
    bounds = chunk_bounds(cache.k_cache, cache.block_table, cache.seq_lens, chunk_size=chunk_size)
    assert bounds.shape == (len(LENS), -(-12 // chunk_size), 2, 2, 8)
    for seq, keys in enumerate(cache.keys):
        for chunk in range(bounds.shape[1]):
            mine = keys[chunk * chunk_size : (chunk + 1) * chunk_size]
            least = mine.min(dim=0).values if len(mine) else torch.zeros(2, 8)
            greatest = mine.max(dim=0).values if len(mine) else torch.zeros(2, 8)
            assert torch.equal(bounds[seq, chunk, 0], least)
            assert torch.equal(bounds[seq, chunk, 1], greatest)


@settings(deadline=None, max_examples=25)
@given(
    chunk_size=st.sampled_from([1, 2, 5, 8, 16]),
    group=st.sampled_from([1, 4]),
    head_dim=st.sampled_from([2, 8, 96]),
    exponent=st.integers(-10, 10),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("scores_of", [chunk_scores_reference, chunk_scores_cpu])
def test_no_exact_score_is_above_its_bound(
    scores_of: Callable[..., Tensor], chunk_size: int, group: int, head_dim: int, exponent: int, seed: int
) -> None:
    cache = poisoned_cache(LENS, head_dim=head_dim, seed=seed)
    torch.manual_seed(seed)
    q = torch.randn(len(LENS), 2 * group, head_dim) * 2.0**exponent
    bounds = chunk_bounds_reference(cache.k_cache, cache.block_table, cache.seq_lens, chunk_size=chunk_size)
    scores = scores_of(q, bounds, cache.seq_lens, chunk_size=chunk_size)
    exact = greatest_exact_scores(q, cache, chunk_size, bounds.shape[1])
    assert (scores.double() >= exact).all()
    assert torch.equal(scores.isneginf(), exact.isneginf())  # a chunk has a bound iff it has a key
    if chunk_size == 1:  # the bound of one key is its score
        torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=2e-5 * 2.0**exponent * head_dim)


def test_scores_do_not_depend_on_strides_of_q() -> None:
    cache = poisoned_cache([9, 4])
    qkv = torch.randn(2, 8, 8)
    bounds = chunk_bounds(cache.k_cache, cache.block_table, cache.seq_lens, chunk_size=4)
    sliced, copied = (
        chunk_scores(q, bounds, cache.seq_lens, chunk_size=4) for q in (qkv[:, 2:6], qkv[:, 2:6].contiguous())
    )
    assert torch.equal(sliced, copied)


def test_bad_arguments_are_named() -> None:
    cache = poisoned_cache([9, 4])
    bounds = chunk_bounds(cache.k_cache, cache.block_table, cache.seq_lens, chunk_size=4)
    with pytest.raises(ValueError, match="k_cache: expected contiguous"):
        chunk_bounds(cache.k_cache.transpose(1, 2), cache.block_table, cache.seq_lens, chunk_size=4)
    with pytest.raises(ValueError, match="seq_lens: expected contiguous int32"):
        chunk_bounds(cache.k_cache, cache.block_table, cache.seq_lens.long(), chunk_size=4)
    with pytest.raises(ValueError, match=r"seq_lens: .*strides \[2\]"):
        chunk_bounds(cache.k_cache, cache.block_table, cache.seq_lens.repeat_interleave(2)[::2], chunk_size=4)
    with pytest.raises(ValueError, match="block_table: expected int32"):
        chunk_bounds(cache.k_cache, cache.block_table.long(), cache.seq_lens, chunk_size=4)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1"):
        chunk_bounds(cache.k_cache, cache.block_table, cache.seq_lens, chunk_size=0)
    with pytest.raises(ValueError, match="multiple of 2 KV heads"):
        chunk_scores(torch.randn(2, 3, 8), bounds, cache.seq_lens, chunk_size=4)
    with pytest.raises(ValueError, match=r"q: expected \[2, num_q_heads, 8\]"):
        chunk_scores(torch.randn(2, 2, 9), bounds, cache.seq_lens, chunk_size=4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("chunk_size", [16, 128])
def test_kernels_compile_for_sm_90(dtype: str, chunk_size: int) -> None:
    dims = {"num_kv_heads": "i32", "head_dim": "i32:16", "num_chunks": "i32"}
    pointers = {"lens_ptr": "*i32", "out_ptr": f"*{dtype}"}
    compile_for_sm90(
        module.chunk_bounds_kernel,
        {"k_ptr": f"*{dtype}", "table_ptr": "*i32", "max_blocks": "i32", **pointers, **dims},
        {"BLOCK_SIZE": 16, "CHUNK": chunk_size, "TILE": min(chunk_size, module.TILE_TOKENS), "DIM": 128},
    )
    strides = {"q_stride_seq": "i32:16", "q_stride_head": "i32:16", "slack": "fp32"}
    compile_for_sm90(
        module.chunk_scores_kernel,
        {"q_ptr": f"*{dtype}", "bounds_ptr": f"*{dtype}", **pointers, "out_ptr": "*fp32", **dims, **strides},
        {"CHUNK": chunk_size, "GROUP": 8, "TILE": module.TILE_CHUNKS, "DIM": 128},
    )
