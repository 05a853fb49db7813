"""When a round is late and when its group counts as lost, judged by the time that such rounds have taken."""

from math import inf

import pytest

from scheduler.engines.patience import Patience, Tuning
from tests.helpers.fake_group import FakeEngine
from tests.helpers.scheduler_sim import Simulation, submit

FLOORLESS = Tuning(min_late_s=0.0, min_lost_s=0.0)
PROMPT = [5, 4, 3, 2, 1]


def test_a_quick_round_still_has_the_time_of_a_busy_machine() -> None:
    patience = Patience()
    assert (patience.late_s(1), patience.lost_s(1)) == (inf, inf), "nothing is known"
    patience.observe(1, 0.001)
    assert (patience.late_s(1), patience.lost_s(1)) == (0.5, 15.0)


def test_a_slow_round_has_a_multiple_of_its_time() -> None:
    patience = Patience()
    patience.observe(4, 3.0)
    assert (patience.late_s(4), patience.lost_s(4)) == (30.0, 60.0)


def test_a_prompt_has_the_time_of_its_tokens_until_one_of_its_length_was_seen() -> None:
    patience = Patience(FLOORLESS)
    patience.observe(1, 0.01)
    assert patience.late_s(1024) == pytest.approx(10 * 0.01 * 1024)
    patience.observe(1024, 0.5)
    assert patience.late_s(1024) == pytest.approx(5.0)
    assert patience.late_s(1) == pytest.approx(0.1)


def test_a_round_that_stood_still_teaches_little_and_a_machine_that_became_slow_is_believed() -> None:
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


def test_the_target_goes_on_without_a_draft_that_is_late() -> None:
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
