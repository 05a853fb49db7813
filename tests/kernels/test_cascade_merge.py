"""The reference of the merge, compared with attention over all keys in fp64."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.upcoming import cascade_merge as module
from kernels.upcoming.cascade_merge import Partial, cascade_merge
from tests.helpers.compile_sm90 import compile_for_sm90

NUM_TOKENS, NUM_HEADS, HEAD_DIM = 3, 2, 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Plain attention of all queries to all keys in the dtype given: results and log-sums, 0 and -inf if there is no
    key."""
    scores = torch.einsum("qhd,khd->qhk", q, k)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.einsum("qhk,khd->qhd", weights, v), lse


def rounded(partial: Partial) -> Partial:
    return partial[0].float().contiguous(), partial[1].float().contiguous()


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
)
def test_any_split_in_any_order_is_attention_over_all_keys(
    sizes: list[int], scale: float, order: random.Random, seed: int
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_DIM, dtype=torch.float64) * scale
    k, v = torch.randn(2, sum(sizes), NUM_HEADS, HEAD_DIM, dtype=torch.float64)
    expected = attend(q, k, v)
    parts = [rounded(attend(q, *kv)) for kv in zip(k.split(sizes), v.split(sizes), strict=True)]
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = cascade_merge(merged, part)
    torch.testing.assert_close(merged[0].double(), expected[0], rtol=1e-5, atol=2e-5)  # fp32 lse up to 1e3
    torch.testing.assert_close(merged[1].double(), expected[1], rtol=1e-6, atol=1e-6)


def test_a_part_without_keys_changes_no_bit() -> None:
    o, lse = torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_DIM), torch.randn(NUM_TOKENS, NUM_HEADS)
    empty = (torch.full_like(o, torch.nan), torch.full_like(lse, -torch.inf))
    for merged in (cascade_merge((o, lse), empty), cascade_merge(empty, (o, lse))):
        assert torch.equal(merged[0], o)
        assert torch.equal(merged[1], lse)
    nothing, nothing_lse = cascade_merge(empty, empty)
    assert torch.equal(nothing, torch.zeros_like(o))
    assert nothing_lse.isneginf().all()


def test_the_result_may_overwrite_a_part() -> None:
    first, second = ((torch.randn(2, 3, 8), torch.randn(2, 3)) for _ in range(2))
    expected = cascade_merge(first, second)[0]
    assert cascade_merge(first, second, out=second[0])[0] is second[0]
    assert torch.equal(second[0], expected)


def test_bad_arguments_are_named() -> None:
    o, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="first: expected floating"):
        cascade_merge((o[0], lse), (o, lse))
    with pytest.raises(ValueError, match="second: expected contiguous o"):
        cascade_merge((o, lse), (o.half(), lse))
    with pytest.raises(ValueError, match="second: expected contiguous fp32 lse"):
        cascade_merge((o, lse), (o, lse.double()))
    with pytest.raises(ValueError, match="out: expected contiguous"):
        cascade_merge((o, lse), (o, lse), out=o[:1])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_kernel_compiles_for_sm_90(dtype: str, head_dim: int) -> None:
    values, lses = dict.fromkeys(["o1_ptr", "o2_ptr", "o_ptr"], f"*{dtype}"), ["lse1_ptr", "lse2_ptr", "lse_ptr"]
    dim = 64 if head_dim == 64 else 128
    compile_for_sm90(
        module.cascade_merge_kernel,
        {**values, **dict.fromkeys(lses, "*fp32"), "num_rows": "i32"},
        {"HEAD_DIM": head_dim, "ROWS": module.TILE_ELEMENTS // dim, "DIM": dim},
        enable_fp_fusion=False,
    )
