"""Background requests, which are items of jobs, get only what the others leave."""

import random
from collections.abc import Callable

import pytest

from scheduler.engines.round_cost import RoundCost
from scheduler.target.background import BackgroundShare
from tests.helpers.fake_group import FakeEngine
from tests.helpers.scheduler_sim import Simulation, submit


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(40) for _ in range(length)]


def test_a_request_takes_the_slot_of_a_background_one_at_once() -> None:
    sim = Simulation(target=FakeEngine(num_slots=2, num_blocks=64, max_model_len=64))
    background = [submit(f"job{i}", prompt(i, 6), max_tokens=30, is_background=True) for i in range(3)]
    for message in background:
        sim.submit(message)
    for _ in range(6):
        sim.step(random.Random(1))
    live = submit("live", prompt(9, 6), max_tokens=8)
    sim.submit(live)
    assert sim.tokens["job1", 0], "both slots are taken"
    while "live" not in sim.completed:
        sim.step(random.Random(1))
    assert not any(message.request_id in sim.completed for message in background)
    sim.run()
    for message in (*background, live):
        sim.assert_plain(message)
    sim.assert_all_free()


def test_a_request_takes_the_blocks_of_background_ones() -> None:
    sim = Simulation(target=FakeEngine(num_slots=8, num_blocks=12, block_size=4, max_model_len=48))
    background = [submit(f"job{i}", prompt(i, 12), max_tokens=12, is_background=True) for i in range(3)]
    for message in background:
        sim.submit(message)
    for _ in range(3):
        sim.step(random.Random(1))
    live = submit("live", prompt(9, 30), max_tokens=8)
    sim.submit(live)
    while "live" not in sim.completed:
        assert not any(message.request_id in sim.completed for message in background)
        sim.step(random.Random(1))
    sim.run()
    for message in (*background, live):
        sim.assert_plain(message)
    sim.assert_all_free()


def test_background_requests_start_only_when_no_other_waits() -> None:
    sim = Simulation(target=FakeEngine(num_slots=1, num_blocks=64, max_model_len=64))
    for i in range(3):
        sim.submit(submit(f"job{i}", prompt(i, 6), max_tokens=4, is_background=True))
        sim.submit(submit(f"live{i}", prompt(10 + i, 6), max_tokens=4))
    order: list[str] = []
    while sim.core.num_requests:
        sim.step(random.Random(1))
        order += [name for name in sim.completed if name not in order]
    assert order == ["live0", "live1", "live2", "job0", "job1", "job2"]


def test_a_full_queue_counts_no_background_requests() -> None:
    sim = Simulation(target=FakeEngine(num_slots=1, num_blocks=64, max_model_len=64), max_queue=2)
    for i in range(6):
        sim.submit(submit(f"job{i}", prompt(i, 6), max_tokens=4, is_background=True))
    sim.submit(submit("live", prompt(9, 6), max_tokens=4))
    sim.run()
    assert {"live", "job5"} <= sim.completed.keys()


def by_line(num_tokens: int) -> int:
    """Nanoseconds of a round."""
    return round(1e9 * (4e-3 + 1e-4 * num_tokens))


def in_tiles(num_tokens: int) -> int:
    """As on CPUs: eight tokens cost hardly more than one, and the ninth half a round."""
    return round(1e9 * (4e-3 + 2e-5 * num_tokens + 2e-3 * ((num_tokens - 1) // 8)))


@pytest.mark.parametrize("round_ns", [by_line, in_tiles])
@pytest.mark.parametrize("max_slowdown", [0.0, 0.01, 0.05, 0.2])
def test_rounds_of_others_grow_by_no_more_than_the_share(max_slowdown: float, round_ns: Callable[[int], int]) -> None:
    share, cost, rng = BackgroundShare(max_slowdown), RoundCost(), random.Random(1)
    for num_tokens in range(1, 200, 3):
        cost.observe(num_tokens, round_ns(num_tokens))
    alone_ns = beside_ns = granted = 0
    for _ in range(2000):
        num_others = rng.randint(1, 12)
        num = share.grant(num_others, cost)
        share.spend(num_others, num, cost)
        cost.observe(num_others + num, round_ns(num_others + num))
        alone_ns, beside_ns, granted = (
            alone_ns + round_ns(num_others),
            beside_ns + round_ns(num_others + num),
            granted + num,
        )
    assert beside_ns <= alone_ns * (1 + 1.05 * max_slowdown) + round_ns(16)
    assert granted >= 2000 * max_slowdown * 10, "whoever waits gets what is left"


def test_tokens_join_the_rounds_in_which_they_cost_least() -> None:
    share, cost = BackgroundShare(0.05), RoundCost()
    for num_tokens in range(1, 33):
        cost.observe(num_tokens, in_tiles(num_tokens))
    granted = {7: 0, 8: 0}
    for number in range(100):
        num_others = 7 + number % 2
        num = share.grant(num_others, cost)
        share.spend(num_others, num, cost)
        granted[num_others] += num
    assert granted[7] > 10 * granted[8]


def slowed(max_slowdown: float, num_jobs: int, round_ns: Callable[[int], int]) -> tuple[float, int]:
    """Simulated time until streams have ended beside so many background requests, and how many tokens these got."""
    target = FakeEngine(
        num_blocks=1024, block_size=16, num_slots=64, max_model_len=512, max_num_batched_tokens=256, run_ns=round_ns
    )
    sim = Simulation(target=target, max_live_slowdown=max_slowdown)
    for i in range(6):  # so that rounds of different sizes are known
        sim.submit(submit(f"warm{i}", prompt(i, 20 + 30 * i), max_tokens=4))
        run_timed(sim, round_ns)
    for i in range(num_jobs):
        sim.submit(submit(f"job{i}", prompt(100 + i, 60), max_tokens=400, is_background=True))
    for _ in range(8 if num_jobs else 0):
        step_timed(sim, round_ns)
    began_s = sim.now
    before = sum(len(tokens) for (name, _), tokens in sim.tokens.items() if name.startswith("job"))
    live = [f"live{i}" for i in range(4)]
    for i, name in enumerate(live):
        sim.submit(submit(name, prompt(i, 8), max_tokens=200))
    while not all(name in sim.completed for name in live):
        step_timed(sim, round_ns)
    after = sum(len(tokens) for (name, _), tokens in sim.tokens.items() if name.startswith("job"))
    return sim.now - began_s, after - before


def step_timed(sim: Simulation, round_ns: Callable[[int], int]) -> None:
    sim.plan()
    tokens = sum(row.chunk_len for row in sim.target_rounds[0].rows)
    sim.now += round_ns(tokens) * 1e-9
    sim.run_target_round()


def run_timed(sim: Simulation, round_ns: Callable[[int], int]) -> None:
    while sim.core.num_requests:
        step_timed(sim, round_ns)


@pytest.mark.parametrize("round_ns", [by_line, in_tiles])
def test_streams_are_slowed_by_no_more_than_was_allowed(round_ns: Callable[[int], int]) -> None:
    alone_s, _ = slowed(0.05, 0, round_ns)
    for max_slowdown in (0.0, 0.05, 0.2):
        beside_s, num_tokens = slowed(max_slowdown, 16, round_ns)
        # A round of background seqs may have begun when the streams came.
        assert beside_s <= alone_s * (1 + max_slowdown) + round_ns(256) * 2e-9
        assert num_tokens >= max_slowdown * 40 * 200 * 0.25, "jobs get what is left to them"
