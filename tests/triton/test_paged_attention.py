"""The split kernel: decode, verify and tree rows over a paged cache, for any lengths, pages and programs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from kernels.attention import schedule as attention_schedule
from kernels.attention.paged_attention import AttentionPlan, paged_attention, plan_attention
from kernels.dispatch import INTERPRETED
from tests.helpers.attention import Case, tree_words

# Lengths around the borders of blocks (16) and key tiles (64 to 128); a seq without new tokens, and an empty one.
RAGGED = [(1, 1), (0, 0), (15, 1), (16, 2), (17, 3), (63, 1), (64, 1), (65, 4), (127, 1), (128, 2), (129, 1), (40, 0)]
SHORT = [(70, 1), (3, 3), (140, 5)]
# fp32: rounding in sums of a few hundred terms of size one. 16-bit: one rounding of the result and one of each weight.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def assert_is_reference(case: Case) -> None:
    out, lse = case.run_with_lse()
    expected_out, expected_lse = case.run_reference()
    assert out.dtype == case.dtype
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.float(), expected_out.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=2e-6)


def run_with_plan(case: Case) -> tuple[Tensor, AttentionPlan]:
    arguments = case.arguments()
    num_blocks, block_size = case.k_cache.shape[:2]
    plan = plan_attention(
        arguments["block_table"],
        arguments["seq_lens"],
        arguments["cu_seqlens_q"],
        num_tokens=case.q.shape[0],
        num_blocks=num_blocks,
        block_size=block_size,
    )
    return paged_attention(**arguments, softmax_scale=case.softmax_scale, plan=plan), plan


@pytest.fixture
def set_programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda number: monkeypatch.setattr(attention_schedule, "resident_programs", lambda device: number)


def test_lengths_at_tile_boundaries(dtype: torch.dtype, device: torch.device) -> None:
    assert_is_reference(Case(seqs=RAGGED, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((4, 4), 64), ((3, 1), 96), ((8, 2), 128), ((8, 1), 80), ((6, 2), 40), ((17, 1), 16), ((2, 2), 256)],
)
def test_heads(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_is_reference(Case(seqs=SHORT, heads=heads, head_dim=head_dim, dtype=dtype, device=device))


@pytest.mark.parametrize("block_size", [1, 5, 24, 256])
def test_blocks_of_any_size(block_size: int, device: torch.device) -> None:
    assert_is_reference(Case(seqs=SHORT, block_size=block_size, device=device))


@pytest.mark.parametrize("sliding_window", [1, 6, 64, 100, 10_000])
def test_sliding_window(sliding_window: int, device: torch.device) -> None:
    assert_is_reference(Case(seqs=[*SHORT, (300, 2)], sliding_window=sliding_window, device=device))


def test_more_rows_than_a_tile(device: torch.device) -> None:
    """A prompt chunk with few tiles of many rows is split as well."""
    case = Case(seqs=[(200, 40), (9, 1)], heads=(8, 1), device=device)
    assert_is_reference(case)
    (schedule,) = run_with_plan(case)[1].schedules.values()
    assert schedule.whole is None or device.type == "cpu"


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_contents_of_unused_slots_have_no_influence(sliding_window: int | None, device: torch.device) -> None:
    options = {"seqs": SHORT, "sliding_window": sliding_window, "device": device}
    clean = Case(**options, poison=0.0).run()
    for poison in (torch.nan, torch.inf):
        assert torch.equal(Case(**options, poison=poison).run(), clean)


def test_keys_before_the_window_have_no_influence(device: torch.device) -> None:
    clean, dirty = (Case(seqs=[(300, 3)], sliding_window=100, device=device) for _ in range(2))
    forgotten = dirty.block_table[0, :12].long()  # positions up to 191; the first query at 297 sees from 198
    dirty.k_cache[forgotten] = torch.nan
    dirty.v_cache[forgotten] = torch.nan
    assert torch.equal(dirty.run(), clean.run())


def test_a_seq_with_nan_keeps_it_to_itself(device: torch.device) -> None:
    case = Case(seqs=[(140, 1), (140, 3), (140, 2)], device=device)
    clean = case.run()
    case.v_cache[case.block_table[1, 0].long(), 0] = torch.nan
    sick = case.run()
    assert sick[1:4].isnan().all()
    assert torch.equal(sick[[0, 4, 5]], clean[[0, 4, 5]])


@pytest.mark.parametrize("seqs", [[], [(0, 0)], [(9, 0), (0, 0)]])
def test_nothing_to_do(seqs: list[tuple[int, int]], device: torch.device) -> None:
    assert Case(seqs=seqs, device=device).run().shape == (0, 4, 32)


def test_scores_of_any_size_stay_finite(device: torch.device) -> None:
    case = Case(seqs=SHORT, device=device)
    case.q *= 1e4  # scores of about ten thousand: one key takes all the weight
    torch.testing.assert_close(case.run(), case.run_reference()[0], rtol=2e-6, atol=2e-6)


def test_strides_of_q_do_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(seqs=SHORT, dtype=dtype, device=device)
    assert not case.q.is_contiguous()
    strided = case.run()
    case.q = case.q.contiguous()
    assert torch.equal(case.run(), strided)


@pytest.mark.parametrize("num_programs", [1, 2, 3, 5, 16, 1000])
def test_any_number_of_programs(num_programs: int, set_programs: Callable[[int], None], device: torch.device) -> None:
    set_programs(num_programs)
    assert_is_reference(Case(seqs=[(700, 2), (1, 1), (300, 1), (129, 4), (400, 1)], device=device))


def test_a_plan_serves_launch_after_launch(device: torch.device) -> None:
    case = Case(seqs=[(700, 2), (300, 1)], device=device)
    first, plan = run_with_plan(case)
    for _ in range(2):
        again = paged_attention(**case.arguments(), softmax_scale=case.softmax_scale, plan=plan)
        assert torch.equal(again, first)
    (schedule,) = plan.schedules.values()
    assert schedule.split is not None
    assert not schedule.split.counters.any()


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter lets us say which program runs when")
def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seqs=[(700, 2), (1, 1), (300, 1)])
    in_order = case.run()
    builder: Any = interpreter.interpreter_builder
    original = builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        original(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert torch.equal(case.run(), in_order)


TREES: list[list[int | None]] = [[None, 0, 0, 1, 1, 2, 2], [None], [None, 0, 1], [None, *(i // 3 for i in range(63))]]


def tree_case(sliding_window: int | None, device: torch.device) -> Case:
    seqs = [(prefix + len(tree), len(tree)) for prefix, tree in zip((125, 0, 63, 40), TREES, strict=True)]
    words = torch.tensor([word for tree in TREES for word in tree_words(tree)])
    return Case(seqs=seqs, heads=(6, 2), ancestors=words, sliding_window=sliding_window, device=device)


@pytest.mark.parametrize("sliding_window", [None, 2, 20])
def test_trees(sliding_window: int | None, device: torch.device) -> None:
    assert_is_reference(tree_case(sliding_window, device))


def test_the_paths_of_a_tree_are_chains(device: torch.device) -> None:
    """Each node gives the result of the last token of its path, if only that path follows the prefix."""
    prefix, parents = 125, TREES[0]
    words = tree_words(parents)
    tree = Case(seqs=[(prefix + len(parents), len(parents))], ancestors=torch.tensor(words), device=device)
    nodes = tree.run()
    for node, word in enumerate(words):
        path = [j for j in range(len(parents)) if word >> j & 1]
        chain = Case(seqs=[(prefix + len(path), len(path))], device=device, poison=0.0)
        chain.q = tree.q[path]
        slots = [(int(chain.block_table[0, p // 16]), p % 16) for p in range(prefix + len(path))]
        for (block, offset), slot in zip(slots, [*range(prefix), *(prefix + j for j in path)], strict=True):
            chain.k_cache[block, offset] = tree.keys[0][slot]
            chain.v_cache[block, offset] = tree.values[0][slot]
        torch.testing.assert_close(chain.run()[-1], nodes[node], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x.transpose(1, 2), r"^q: .*contiguous features"),
        ("k_cache", lambda x: x.transpose(0, 1), r"^k_cache: expected contiguous"),
        ("seq_lens", lambda x: x * 0 + 2, r"^seq_lens: seq 1 has 3 new tokens, but a length of 2"),
        ("block_table", lambda x: x[:, :2], r"^block_table: seq 0 has 70 tokens, but 2 blocks of 16"),
        ("seq_lens", lambda x: x.repeat_interleave(2)[::2], r"^seq_lens: .*with strides \[2\]"),
        ("block_table", lambda x: x.t().contiguous().t(), r"^block_table: .*with strides \[1, 3\]"),
        ("cu_seqlens_q", lambda x: x + 1, r"^cu_seqlens_q: expected to run from 0 to 9, got 1 to 10"),
    ],
)
def test_errors_name_the_argument(name: str, change: Any, message: str, device: torch.device) -> None:
    case = Case(seqs=SHORT, device=device)
    arguments = case.arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments, softmax_scale=case.softmax_scale)
