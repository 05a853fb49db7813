"""The speculation policy with random input: it always answers, within the limits, and never raises."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policy.continuous import ContinuousPolicy
from scheduler.policy.policy import Drafts, SpeculationPolicy
from scheduler.policy.serial import SerialPolicy

MAX_DRAFTS = 6

_TIMES = st.one_of(st.floats(0.0, 0.1), st.sampled_from([0.0, 1e-9, 30.0]))
_SEQS = st.lists(
    st.builds(
        Drafts,
        acceptance=st.floats(0.0, 1.0),
        num_ready=st.integers(0, 8),
        num_coming=st.integers(0, 8),
        limit=st.integers(0, 8),
        is_fixed=st.booleans(),
        num_behind=st.integers(0, 5000),
        may_hold=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
_TARGET = st.tuples(st.just("target"), st.integers(1, 6), st.integers(0, 40), st.integers(0, 10**6), _TIMES)
_DRAFT = st.tuples(st.just("draft"), st.integers(0, 6), st.integers(0, 8), st.integers(0, 3000), _TIMES, st.booleans())
_VERDICT = st.tuples(st.just("verdict"), st.integers(0, 8), st.integers(0, 8))
_ASK = st.tuples(st.just("ask"), _SEQS, st.integers(0, 512), st.integers(0, 3))


@pytest.mark.parametrize(("pipeline", "has_branches"), [("serial", False), ("continuous", False), ("continuous", True)])
@pytest.mark.parametrize("adaptive", [True, False])
@settings(max_examples=60, deadline=None)
@given(window=st.integers(0, 6), events=st.lists(st.one_of(_TARGET, _DRAFT, _VERDICT, _ASK), max_size=40))
def test_the_policy_survives_any_history(
    pipeline: str,
    has_branches: bool,
    adaptive: bool,
    window: int,
    events: list[tuple[Any, ...]],
) -> None:
    policy: SpeculationPolicy
    if pipeline == "serial":
        policy = SerialPolicy(max_drafts=MAX_DRAFTS, adaptive=adaptive)
    else:
        policy = ContinuousPolicy(max_drafts=MAX_DRAFTS, adaptive=adaptive, window=window, has_branches=has_branches)
    for event in events:
        if event[0] == "target":
            _, num_seqs, num_drafts, num_context, run_s = event
            policy.observe_target(
                num_seqs=num_seqs, num_tokens=num_seqs + num_drafts, num_context=num_context, run_s=run_s
            )
        elif event[0] == "draft":
            _, num_seqs, num_steps, num_chunk_tokens, run_s, beside_target = event
            policy.observe_draft(
                num_seqs=num_seqs,
                num_steps=num_steps,
                num_chunk_tokens=num_chunk_tokens,
                run_s=run_s,
                beside_target=beside_target,
            )
        elif event[0] == "verdict":
            policy.prior.observe(min(event[1:]), max(event[1:]))
        else:
            _ask(policy, *event[1:])


def _ask(policy: SpeculationPolicy, seqs: list[Drafts], num_other_tokens: int, num_waiting: int) -> None:
    lengths = policy.draft_lengths(seqs)
    assert len(lengths) == len(seqs)
    assert all(length >= 0 for length in lengths)
    assert all(length == 0 for length, seq in zip(lengths, seqs, strict=True) if seq.limit == 0)
    choices = policy.choose(seqs, num_other_tokens=num_other_tokens, num_waiting=num_waiting)
    for choice, seq in zip(choices, seqs, strict=True):
        assert 0 <= choice.num_verify <= min(seq.num_ready, seq.limit)
        assert 0.0 <= choice.hold_s < math.inf
    assert 0.0 <= policy.draft_step_cost < math.inf
    if policy.times.target_is_known:
        assert all(0.0 < policy.times.target_s(num_tokens) < math.inf for num_tokens in (1, 7, 50))
    policy.should_extend(0.5, 0.5)
    policy.pays_to_catch_up(num_seqs=len(seqs), num_behind=100, num_left=50)
