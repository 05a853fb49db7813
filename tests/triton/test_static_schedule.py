"""Attention of a captured step: lengths are known on the device alone, and some tokens and seqs are padding."""

import pytest
import torch
from torch.nn import functional as F

from kernels.attention import static_schedule
from kernels.attention.paged_attention import paged_attention, plan_attention
from kernels.attention.paged_kv import LengthBounds
from tests.helpers.attention import Case

NUM_PADDING = 5  # tokens that belong to no seq
# With seqs that have no new tokens, and no tokens at all, first, in the middle and last.
SEQS = [(0, 0), (70, 1), (3, 3), (0, 0), (140, 6), (129, 2), (40, 0), (17, 6), (0, 0)]


def run(case: Case, *, max_new: int, batch_invariant: bool) -> torch.Tensor:
    arguments = case.arguments()
    arguments["q"] = F.pad(arguments["q"], (0, 0, 0, 0, 0, NUM_PADDING), value=torch.nan)
    num_blocks, block_size = case.k_cache.shape[:2]
    plan = plan_attention(
        arguments["block_table"],
        arguments["seq_lens"],
        arguments["cu_seqlens_q"],
        num_tokens=arguments["q"].shape[0],
        num_blocks=num_blocks,
        block_size=block_size,
        lengths=LengthBounds(len(case.seqs), max_new),
    )
    options = {"softmax_scale": case.softmax_scale, "sliding_window": case.sliding_window}
    for _ in range(2):  # layers share the schedule, and its counters
        out = paged_attention(**arguments, **options, plan=plan, batch_invariant=batch_invariant)
    return out[:-NUM_PADDING]


@pytest.mark.parametrize(("heads", "head_dim", "programs"), [((4, 2), 32, 200), ((8, 1), 80, 7), ((17, 1), 16, 1)])
def test_it_is_the_reference(
    heads: tuple[int, int],
    head_dim: int,
    programs: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(static_schedule, "resident_programs", lambda device: programs)
    case = Case(seqs=SEQS, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
    expected, _ = case.run_reference()
    tolerance = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for max_new in (6, 17):
        out = run(case, max_new=max_new, batch_invariant=False)
        torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [1, 20])
def test_windows(window: int, device: torch.device) -> None:
    case = Case(seqs=SEQS, sliding_window=window, device=device)
    expected, _ = case.run_reference()
    for batch_invariant in (False, True):
        out = run(case, max_new=8, batch_invariant=batch_invariant)
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


def test_batch_invariant_bits_are_those_of_the_schedule_of_the_host(device: torch.device) -> None:
    case = Case(seqs=SEQS, device=device)
    for max_new in (6, 17):
        assert torch.equal(run(case, max_new=max_new, batch_invariant=True), case.run(batch_invariant=True))


def test_a_step_of_nothing_but_padding_computes_nothing(device: torch.device) -> None:
    case = Case(seqs=[(0, 0), (0, 0)], device=device)
    assert run(case, max_new=2, batch_invariant=False).shape[0] == 0
