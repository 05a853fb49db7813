"""Step times learned from rounds."""

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policy.step_times import DraftTimes, StepTimes


def test_small_batches_are_known_exactly_even_if_times_rise_in_steps() -> None:
    times = StepTimes()
    stairs = {1: 0.010, 2: 0.010, 3: 0.014, 4: 0.014, 5: 0.030}
    for _ in range(5):
        for num_tokens, run_s in stairs.items():
            times.observe(num_tokens, run_s)
    for num_tokens, run_s in stairs.items():
        assert times.predict(num_tokens) == pytest.approx(run_s)


def test_unseen_sizes_are_interpolated_and_extrapolated() -> None:
    times = StepTimes()
    for num_tokens in (8, 16, 32):
        times.observe(num_tokens, 0.001 * num_tokens)
    assert 0.008 <= times.predict(12) <= 0.012, "on the fast side, so that it is tried"
    assert times.predict(64) == pytest.approx(0.064)
    assert times.predict(1) == pytest.approx(0.008), "nothing is faster than the smallest seen"


def test_more_tokens_never_seem_faster() -> None:
    times = StepTimes()
    for num_tokens, run_s in ((1, 0.010), (2, 0.012), (3, 0.011), (4, 0.013)):
        times.observe(num_tokens, run_s)
    predicted = [times.predict(n) for n in range(1, 9)]
    assert predicted == sorted(predicted)


def test_the_cost_of_context_is_separated_from_that_of_tokens() -> None:
    times = StepTimes()
    for index in range(60):
        for num_tokens in (1, 4):
            num_context = 100 * (index % 10) + 50 * num_tokens
            times.observe(num_tokens, 0.010 + 0.001 * num_tokens + 1e-6 * num_context, num_context=num_context)
    assert times.predict(4, num_context=2000) == pytest.approx(0.016, rel=0.05)
    assert times.predict(1, num_context=0) == pytest.approx(0.011, rel=0.05)


def test_noise_is_not_taken_for_the_cost_of_context() -> None:
    times = StepTimes()
    for num_context, run_s in ((3000, 0.042), (3001, 0.046), (3002, 0.044), (3003, 0.048)):
        times.observe(4, run_s, num_context=num_context)
    times.observe(1, 0.040, num_context=700)
    assert times.predict(1) == pytest.approx(0.040, rel=0.05)
    assert times.predict(4) == pytest.approx(0.045, rel=0.05)


def test_a_short_request_after_a_long_one_is_not_thought_fast() -> None:
    times = StepTimes()
    noise = Random(3)
    for number in range(200):
        times.observe(4, 0.042 + noise.gauss(0.0, 0.004) + 1e-5 * (number % 100), num_context=30_000 + 3 * number)
    for number in range(3):
        times.observe(1, 0.040, num_context=200 + number)
    assert times.predict(1) == pytest.approx(0.040, rel=0.05)
    assert times.predict(4) == pytest.approx(0.042, rel=0.15)


_OBSERVATIONS = st.lists(
    st.tuples(st.integers(1, 6), st.floats(0.0, 1.0), st.integers(0, 100_000)), min_size=1, max_size=30
)


@settings(deadline=None)
@given(_OBSERVATIONS)
def test_a_forward_never_seems_to_take_no_time(observations: list[tuple[int, float, int]]) -> None:
    times = StepTimes()
    for num_tokens, run_s, num_context in observations:
        times.observe(num_tokens, run_s, num_context=num_context)
        assert all(0.0 < times.predict(n) < math.inf for n in range(1, 9))
        assert times.predict(1, num_context=0) > 0.0


def test_a_hiccup_is_ignored_and_a_slower_machine_is_not() -> None:
    times = StepTimes()
    for _ in range(30):
        times.observe(1, 0.010)
    times.observe(1, 5.0)
    assert times.predict(1) < 0.011
    for _ in range(60):
        times.observe(1, 0.030)
    assert times.predict(1) == pytest.approx(0.030, rel=0.1)


def test_the_time_of_a_draft_round_is_that_of_its_chunk_and_its_steps() -> None:
    times = DraftTimes()
    for num_steps in (1, 4, 2, 8) * 10:
        times.observe(num_seqs=4, num_steps=num_steps, num_chunk_tokens=9, run_s=0.003 + 0.002 * (num_steps - 1))
    assert times.step_s(4) == pytest.approx(0.002, rel=0.1)
    assert times.chunk_s(9) == pytest.approx(0.003, rel=0.1)


def test_a_draft_round_never_seems_to_take_no_time() -> None:
    times = DraftTimes()
    for num_steps in (1, 4, 2, 5) * 10:
        times.observe(num_seqs=4, num_steps=num_steps, num_chunk_tokens=5, run_s=0.005 + 0.007 * num_steps)
    for num_steps in (1, 3, 6):
        round_s = times.start_s(4) + num_steps * times.further_s(4)
        assert round_s == pytest.approx(0.005 + 0.007 * num_steps, rel=0.1)


def test_rounds_of_one_length_do_not_show_the_fixed_part() -> None:
    times = DraftTimes()
    for _ in range(20):
        times.observe(num_seqs=1, num_steps=3, num_chunk_tokens=1, run_s=0.030)
    assert times.start_s(1) == pytest.approx(0.0, abs=1e-4)
    assert times.further_s(1) == pytest.approx(0.010, rel=0.01)


def test_one_slow_observation_does_not_rule_out_a_size() -> None:
    times = StepTimes()
    for _ in range(20):
        for num_tokens in (4, 8, 12, 24):
            times.observe(num_tokens, 0.040 + 0.002 * num_tokens)
    times.observe(16, 0.100)
    assert times.predict(16) < 0.080
    for _ in range(20):
        times.observe(16, 0.100)
    assert times.predict(16) == pytest.approx(0.094, rel=0.1), "it is slow, not only once"
