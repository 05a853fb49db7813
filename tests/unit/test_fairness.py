"""How long prompts wait for their first token, in simulated time: a round costs a fixed part and a part per token."""

import random

import pytest

from scheduler.engines.round_cost import RoundCost
from scheduler.target.prefill import Prompt, share_prefill
from tests.helpers.fake_group import FakeEngine
from tests.helpers.scheduler_sim import Simulation, submit

FIXED_S = 4e-3
PER_TOKEN_S = 1e-4
KNEE = 40  # tokens that take as long as the fixed part
MAX_MODEL_LEN = 4096
SHORT = 8 * KNEE


def round_ns(num_tokens: int) -> int:
    return round(1e9 * (FIXED_S + PER_TOKEN_S * num_tokens))


class TimedSimulation(Simulation):
    """Target rounds take time; rounds and arrivals happen in the order of their times."""

    def __init__(self) -> None:
        target = FakeEngine(
            num_blocks=1024,
            block_size=16,
            num_slots=64,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=1024,
            run_ns=round_ns,
        )
        super().__init__(target=target)

    def play(self, arrivals: list[tuple[float, str, int, int]]) -> dict[str, float]:
        """arrivals: time, id, prompt tokens, max_tokens -> time from arrival to first token of each."""
        arrivals = sorted(arrivals)
        arrived = {request_id: time_s for time_s, request_id, _, _ in arrivals}
        pending = arrivals.copy()
        while pending or self.core.num_requests:
            self.plan()
            if not self.target_rounds:
                self.arrive(pending.pop(0))
                continue
            # The round has begun; requests that arrive before its end are queued.
            tokens = sum(row.chunk_len for row in self.target_rounds[0].rows)
            end = self.now + round_ns(tokens) * 1e-9
            while pending and pending[0][0] < end:
                self.arrive(pending.pop(0))
                self.plan()
            self.now = end
            self.run_target_round()
        return {request_id: self.first_token_at[request_id] - time_s for request_id, time_s in arrived.items()}

    def arrive(self, arrival: tuple[float, str, int, int]) -> None:
        time_s, request_id, length, max_tokens = arrival
        self.now = max(self.now, time_s)
        rng = random.Random(request_id)
        self.submit(submit(request_id, [rng.randrange(40) for _ in range(length)], max_tokens=max_tokens))


def alone(length: int) -> float:
    """Time to first token on a scheduler that has seen the same load before and has nothing else to do."""
    sim = TimedSimulation()
    sim.play([(0.0, f"warm{i}", 20 * i + 20, 2) for i in range(8)])
    sim.now += 60.0
    return sim.play([(sim.now, "alone", length, 2)])["alone"]


def stream(start: float, count: int, gap_s: float) -> list[tuple[float, str, int, int]]:
    rng = random.Random(3)
    return [(start + gap_s * (i + rng.random()), f"short{i}", SHORT, 12) for i in range(count)]


# Short prompts take about this share of the target's time: 12 %, 18 %, 24 %.
@pytest.mark.parametrize("gap_s", [0.3, 0.2, 0.15])
@pytest.mark.parametrize("phase", [0.0, 0.31, 0.62, 0.93])
def test_first_tokens_come_within_twice_the_time_alone(gap_s: float, phase: float) -> None:
    sim = TimedSimulation()
    count = round(3.0 / gap_s)
    waits = sim.play([*stream(0.0, count, gap_s), (5.0 * gap_s * (1 + phase), "long", MAX_MODEL_LEN - 16, 8)])
    assert waits.pop("long") <= 2 * alone(MAX_MODEL_LEN - 16)
    assert len(waits) == count
    assert max(waits.values()) <= 2 * alone(SHORT)


def share(lengths: list[int], budget: int, *, shortest: int | None, knee: int) -> list[int]:
    """The shares of prompts whose computation has not begun."""
    return share_prefill([Prompt(n, n) for n in lengths], budget, shortest=shortest, knee=knee)


def test_a_lone_prompt_gets_the_whole_budget() -> None:
    assert share([4000], 1024, shortest=4000, knee=40) == [1024]
    assert share([4000], 1024, shortest=None, knee=40) == [1024]


def test_prompts_of_similar_length_are_served_in_order() -> None:
    assert share([700, 500, 600], 1024, shortest=500, knee=40) == [700, 324, 0]


def test_short_prompts_are_computed_whole_beside_a_chunk_of_the_long() -> None:
    assert share([4000, 320, 320], 1024, shortest=320, knee=40) == [320, 320, 320]
    assert share([4000, 320], 1024, shortest=320, knee=8) == [160, 320]
    assert share([4000], 1024, shortest=320, knee=40) == [80]


def test_many_short_prompts_do_not_starve_the_long() -> None:
    shares = share([100] * 50 + [4000], 1024, shortest=100, knee=10)
    assert shares[-1] >= 1024 // 3
    assert sum(shares) <= 1024


def test_a_long_prompt_stays_long_to_its_end() -> None:
    assert share_prefill([Prompt(500, 4000)], 1024, shortest=320, knee=40) == [80]


def test_several_long_prompts_share_their_chunk() -> None:
    assert share([4000, 3000, 900], 1024, shortest=300, knee=50) == [50, 0, 50]


@pytest.mark.parametrize("seed", range(200))
def test_shares_fit_the_budget_and_the_oldest_prompt_advances(seed: int) -> None:
    rng = random.Random(seed)
    remaining = [rng.choice([2, 30, 400, 5000]) + rng.randrange(9) for _ in range(rng.randint(1, 12))]
    budget = rng.choice([1, 2, 7, 100, 2048])
    shares = share(remaining, budget, shortest=rng.choice([None, 2, 31, 400]), knee=rng.choice([8, 64, 1024]))
    assert sum(shares) <= budget
    assert all(0 <= share <= left for share, left in zip(shares, remaining, strict=True))
    assert shares[0] > 0


def test_the_knee_is_learned_from_rounds() -> None:
    cost = RoundCost()
    assert cost.knee == 64
    for num_tokens in (1, 1, 300, 80, 1, 500):
        cost.observe(num_tokens, round_ns(num_tokens))
    assert abs(cost.knee - KNEE) <= 1


def test_rounds_of_one_size_reveal_no_knee() -> None:
    cost = RoundCost()
    for _ in range(50):
        cost.observe(8, round_ns(8))
    assert cost.knee == 64


def test_a_tenant_with_many_requests_delays_others_by_no_more_than_one() -> None:
    """Two slots: those who come later need not wait for what is queued, and then take turns with it."""
    sim = Simulation(target=FakeEngine(num_blocks=256, block_size=16, num_slots=2, max_model_len=512))
    for number in range(20):
        sim.submit(submit(f"greedy-{number}", [1, 2, 3], max_tokens=8, tenant="greedy"))
    sim.plan()
    for name in ("alice", "bob"):
        sim.submit(submit(name, [4, 5], max_tokens=8, tenant=name))
    sim.run()
    ends = list(sim.completed)
    assert set(ends[:4]) == {"greedy-0", "greedy-1", "alice", "bob"}
    assert [name for name in ends if name.startswith("greedy")] == [f"greedy-{number}" for number in range(20)]
