"""When a round is late and when its group counts as lost, judged by the time that such rounds have taken."""

from collections.abc import Callable
from math import inf

import pytest

from scheduler.engines.patience import Patience, Tuning
from tests.helpers.fake_group import FakeEngine
from tests.helpers.scheduler_sim import Simulation, submit

FLOORLESS = Tuning(min_late_s=0.0, min_lost_s=0.0)
PROMPT = [5, 4, 3, 2, 1]


def test_a_quick_round_is_allowed_the_time_of_a_busy_machine() -> None:
    patience = Patience()
    assert (patience.late_s(1), patience.lost_s(1)) == (inf, inf), "nothing is known"
    patience.observe(1, 0.001)
    assert (patience.late_s(1), patience.lost_s(1)) == (0.5, 15.0)


def test_a_slow_round_is_allowed_a_multiple_of_its_time() -> None:
    patience = Patience()
    patience.observe(4, 3.0)
    assert (patience.late_s(4), patience.lost_s(4)) == (30.0, 60.0)


def test_a_prompt_is_allowed_time_in_proportion_until_one_of_its_length_was_seen() -> None:
    patience = Patience(FLOORLESS)
    patience.observe(1, 0.01)
    assert patience.late_s(1024) == pytest.approx(10 * 0.01 * 1024)
    patience.observe(1024, 0.5)
    assert patience.late_s(1024) == pytest.approx(5.0)
    assert patience.late_s(1) == pytest.approx(0.1)


def test_one_stalled_round_teaches_little_but_a_machine_that_became_slow_is_believed() -> None:
    patience = Patience(FLOORLESS)
    patience.observe(1, 0.01)
    patience.observe(1, 60.0)
    assert patience.late_s(1) == pytest.approx(0.2)
    for _ in range(10):
        patience.observe(1, 1.0)
    assert patience.late_s(1) == pytest.approx(10.0)
    for _ in range(1000):
        patience.observe(1, 0.01)
    assert patience.late_s(1) == pytest.approx(0.1, rel=0.01)


def test_the_target_continues_without_a_late_draft() -> None:
    """In the serial pipeline, where it would otherwise wait for the drafts until their group counts as lost."""
    sim = Simulation(draft=FakeEngine(role=2))
    first, second = (submit(name, PROMPT, max_tokens=60) for name in ("first", "second"))
    sim.submit(first)
    while len(sim.tokens.get(("first", 0), ())) < 20:
        sim.now += 0.01
        sim.step()
    sim.plan()
    while not sim.draft_rounds:
        sim.now += 0.01
        sim.run_target_round()
        sim.plan()
    assert not sim.target_rounds
    release = sim.core.next_release()
    assert release is not None
    sim.now = release - 0.001
    sim.plan()
    assert not sim.target_rounds, "it has yet some time"
    sim.now = release
    sim.plan()
    while "first" not in sim.completed:
        sim.run_target_round()
        sim.plan()
    sim.assert_plain(first)
    sim.now += 60.0
    sim.submit(second)
    sim.run()
    sim.assert_plain(second)
    assert sim.completed["second"].speculation.num_accepted_tokens > 0
    sim.assert_all_free()


def prompt_rounds(ns_of_token: Callable[[int], float]) -> list[tuple[int, float]]:
    """Tokens and seconds of the rounds in which a prompt of 8000 tokens is computed; `ns_of_token`: by position."""
    position = 0

    def run_ns(num_tokens: int) -> int:
        nonlocal position
        spent = sum(ns_of_token(position + i) for i in range(num_tokens))
        position += num_tokens
        rounds.append((num_tokens, spent * 1e-9))
        return int(spent)

    rounds: list[tuple[int, float]] = []
    engine = FakeEngine(num_blocks=2001, block_size=4, max_model_len=8004, max_num_batched_tokens=8192, run_ns=run_ns)
    sim = Simulation(target=engine)
    sim.submit(submit("long", [number % 30 for number in range(8000)], max_tokens=1))
    sim.run()
    return rounds


def test_rounds_of_a_prompt_stay_far_from_the_time_after_which_a_group_is_lost() -> None:
    """Even on an engine that takes 100 ms for a token, and twice as long at the end of the prompt."""
    rounds = prompt_rounds(lambda position: 1e8 * (1 + position / 8000))
    assert sum(num_tokens for num_tokens, _ in rounds) == 8000
    assert max(seconds for _, seconds in rounds) < 30.0
    assert len(rounds) < 8000 / 40


def test_a_fast_engine_computes_a_prompt_in_few_rounds_though_its_first_one_was_slow() -> None:
    """A kernel was compiled."""
    assert [num_tokens for num_tokens, _ in prompt_rounds(lambda position: 1e4)] == [256, 7744]
    slow_once = prompt_rounds(lambda position: 1e8 if position < 256 else 1e4)
    assert [num_tokens for num_tokens, _ in slow_once] == [256, 100, 7644]
