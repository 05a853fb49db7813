"""The kernel for prompt chunks: many new tokens of a seq attend to its prefix and to each other, beside other rows."""

import pytest
import torch

from kernels.attention import schedule as attention_schedule
from kernels.attention.paged_attention import paged_attention, plan_attention
from kernels.attention.schedule import Schedule
from tests.helpers.attention import Case

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that any device runs few programs, so that the chunks of these tests fill it."""
    monkeypatch.setattr(attention_schedule, "resident_programs", lambda device: 2)


def check(case: Case) -> Schedule:
    """Compares with the reference, and returns which kernel took what."""
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
    out, lse = paged_attention(
        **arguments,
        softmax_scale=case.softmax_scale,
        sliding_window=case.sliding_window,
        return_lse=True,
        plan=plan,
    )
    expected_out, expected_lse = case.run_reference()
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.float(), expected_out.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=2e-6)
    (schedule,) = plan.schedules.values()
    return schedule


@pytest.mark.parametrize("prefix", [0, 15, 16, 17, 127, 128, 129])
def test_prefixes_at_tile_boundaries(prefix: int, device: torch.device) -> None:
    schedule = check(Case(seqs=[(prefix + 70, 70)], device=device))
    assert schedule.whole is not None
    assert schedule.split is None


@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 64), ((3, 1), 96), ((4, 1), 128), ((8, 1), 80), ((6, 2), 40)])
def test_heads(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(seqs=[(100, 67), (3, 0)], heads=heads, head_dim=head_dim, dtype=dtype, device=device)
    assert check(case).whole is not None


@pytest.mark.parametrize("block_size", [1, 5, 256])
def test_blocks_of_any_size(block_size: int, device: torch.device) -> None:
    assert check(Case(seqs=[(150, 70)], block_size=block_size, device=device)).whole is not None


@pytest.mark.parametrize("sliding_window", [1, 6, 31, 64, 100, 200, 10_000])
def test_sliding_window(sliding_window: int, device: torch.device) -> None:
    """Some key tiles reach out of the window, some lie in it for all rows, and some hide the future."""
    case = Case(seqs=[(330, 70)], head_dim=64, sliding_window=sliding_window, device=device)
    assert check(case).whole is not None


def test_a_mixed_batch_takes_both_paths(dtype: torch.dtype, device: torch.device) -> None:
    """Decode and verify rows beside chunks, a seq without new tokens, and an empty seq."""
    seqs = [(33, 1), (130, 90), (20, 0), (140, 4), (65, 65), (0, 0), (1, 1)]
    schedule = check(Case(seqs=seqs, dtype=dtype, device=device))
    assert schedule.whole is not None
    assert schedule.split is not None
    assert set(schedule.whole.query_tiles[:, 0].tolist()) == {1, 4}
    assert set(schedule.split.query_tiles[:, 0].tolist()) == {0, 3, 6}


@pytest.mark.parametrize("sliding_window", [None, 40])
def test_contents_of_unused_slots_have_no_influence(sliding_window: int | None, device: torch.device) -> None:
    options = {"seqs": [(140, 70), (65, 65)], "sliding_window": sliding_window, "device": device}
    clean = Case(**options, poison=0.0).run()
    for poison in (torch.nan, torch.inf):
        assert torch.equal(Case(**options, poison=poison).run(), clean)


def test_keys_before_the_window_have_no_influence(device: torch.device) -> None:
    clean, dirty = (Case(seqs=[(300, 70)], sliding_window=60, device=device) for _ in range(2))
    forgotten = dirty.block_table[0, :10].long()  # positions up to 159; the first query at 230 sees from 171
    dirty.k_cache[forgotten] = torch.nan
    dirty.v_cache[forgotten] = torch.nan
    assert torch.equal(dirty.run(), clean.run())


def test_strides_of_q_do_not_matter(device: torch.device) -> None:
    case = Case(seqs=[(140, 70)], device=device)
    assert not case.q.is_contiguous()
    strided = case.run()
    case.q = case.q.contiguous()
    assert torch.equal(case.run(), strided)
