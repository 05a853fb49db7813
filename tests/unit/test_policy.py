"""The speculation policy in simulated worlds for which the best choice is known."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from scheduler.policy.acceptance import expected_tokens
from scheduler.policy.continuous import ContinuousPolicy
from scheduler.policy.policy import Drafts, SpeculationPolicy
from scheduler.policy.serial import SerialPolicy
from tests.helpers.policy_sim import Fixed, Outcome, Simulation, World

MAX_DRAFTS = 8
Law = Callable[[int], float]


def line(base_s: float, token_s: float) -> Law:
    return lambda num_tokens: base_s + token_s * num_tokens


def roofline(base_s: float, knee: int, token_s: float) -> Law:
    """Seconds of a round that is bound by memory up to `knee` tokens."""
    return lambda num_tokens: base_s + max(0, num_tokens - knee) * token_s


def staircase(num_tokens: int) -> float:
    """Seconds of a round with graphs captured for powers of two."""
    return 0.010 * (1.0 + 0.15 * (num_tokens - 1).bit_length())


CPU = roofline(0.010, 8, 0.0008)
GPU = roofline(0.020, 200, 0.0001)
COMPUTE = line(0.002, 0.004)
SMALL_DRAFT = line(0.0009, 0.00002)
BIG_DRAFT = line(0.0022, 0.00002)
SELF_DRAFT = line(0.0034, 0.0002)


def world(verify_s: Law, step_s: Law, acceptance: float, num_seqs: int = 1, slowdown: float = 1.07) -> World:
    return World(
        verify_s=verify_s,
        step_s=step_s,
        acceptance=lambda number, over: acceptance,
        num_seqs=lambda over: num_seqs,
        slowdown=slowdown,
    )


def new_policy(pipeline: str, **options: bool) -> SpeculationPolicy:
    kind = SerialPolicy if pipeline == "serial" else ContinuousPolicy
    return kind(max_drafts=MAX_DRAFTS, **({"adaptive": True} | options))


def best_serial_rate(given: World, num_seqs: int) -> tuple[float, int]:
    """Tokens per second with the best fixed number of drafts, which may be 0, and that number."""

    def rate(k: int) -> float:
        draft_s = given.step_s(2 * num_seqs) + (k - 1) * given.step_s(num_seqs) if k else 0.0
        tokens = num_seqs * expected_tokens(given.acceptance(0, 0.0), k)
        return tokens / (draft_s + given.verify_s(num_seqs * (k + 1)))

    return max((rate(k), k) for k in range(MAX_DRAFTS + 1))


def best_continuous_rate(given: World) -> float:
    """The same for the continuous pipeline, by brute force over drafts, window and hold."""
    policies = [Fixed(num_drafts=0)]
    for k in (2, 3, 4, 6, 8):
        policies += [Fixed(num_drafts=k, window=w, num_held=h) for w in (k, 16) for h in (0, k // 2, k)]
    return max(Simulation(given, policy, num_tokens=700).continuous().rate for policy in policies)


@pytest.mark.parametrize(
    ("verify_s", "step_s", "acceptance", "num_seqs"),
    [
        (CPU, SMALL_DRAFT, 0.02, 1),
        (CPU, SMALL_DRAFT, 0.6, 1),
        (CPU, SMALL_DRAFT, 0.9, 1),
        (CPU, SMALL_DRAFT, 0.8, 4),
        (CPU, SMALL_DRAFT, 0.8, 16),
        (CPU, BIG_DRAFT, 0.3, 4),
        (CPU, BIG_DRAFT, 0.8, 1),
        (CPU, SELF_DRAFT, 0.3, 1),  # never pays
        (CPU, SELF_DRAFT, 0.7, 1),
        (staircase, SMALL_DRAFT, 0.6, 4),
        (staircase, SMALL_DRAFT, 0.3, 1),
        (COMPUTE, SMALL_DRAFT, 0.8, 1),
        (COMPUTE, SMALL_DRAFT, 0.93, 16),
        (GPU, SMALL_DRAFT, 0.8, 16),
    ],
)
def test_serial_is_as_good_as_the_best_fixed_number(
    verify_s: Law, step_s: Law, acceptance: float, num_seqs: int
) -> None:
    given = world(verify_s, step_s, acceptance, num_seqs)
    outcome = Simulation(given, new_policy("serial"), num_tokens=1500 + 500 * num_seqs).serial()
    best, _ = best_serial_rate(given, num_seqs)
    assert outcome.rate_between(0.4, 1.0) >= 0.99 * best, "once it has learned"
    assert outcome.rate >= 0.95 * best, "learning included"


@pytest.mark.parametrize(("step_s", "acceptance"), [(SMALL_DRAFT, 0.6), (SMALL_DRAFT, 0.85), (BIG_DRAFT, 0.8)])
def test_continuous_is_as_good_as_the_best_window_and_hold(step_s: Law, acceptance: float) -> None:
    given = world(CPU, step_s, acceptance)
    outcome = Simulation(given, new_policy("continuous"), num_tokens=3000).continuous()
    assert outcome.rate_between(0.3, 1.0) >= 0.95 * best_continuous_rate(given)


@pytest.mark.parametrize("num_seqs", [1, 16])
@pytest.mark.parametrize("pipeline", ["serial", "continuous"])
def test_a_useless_draft_costs_little(pipeline: str, num_seqs: int) -> None:
    given = world(CPU, SMALL_DRAFT, 0.0, num_seqs)
    outcome = run(given, new_policy(pipeline), 600 * num_seqs)
    assert outcome.rate >= 0.97 * num_seqs / given.verify_s(num_seqs)


def run(given: World, policy: SpeculationPolicy, num_tokens: int) -> Outcome:
    simulation = Simulation(given, policy, num_tokens=num_tokens)
    return simulation.serial() if isinstance(policy, SerialPolicy) else simulation.continuous()


@pytest.mark.parametrize("pipeline", ["serial", "continuous"])
def test_the_policy_recovers_when_drafts_become_good(pipeline: str) -> None:
    given = World(verify_s=CPU, step_s=SMALL_DRAFT, acceptance=lambda number, over: 0.02 if over < 0.3 else 0.8)
    outcome = run(given, new_policy(pipeline), 5000)
    good, _ = best_serial_rate(world(CPU, SMALL_DRAFT, 0.8), 1)
    assert outcome.rate_between(0.0, 0.3) < 0.5 * good
    assert outcome.rate_between(0.9, 1.0) >= 0.95 * good


@pytest.mark.parametrize("pipeline", ["serial", "continuous"])
def test_the_policy_stops_when_drafts_become_bad(pipeline: str) -> None:
    given = World(verify_s=CPU, step_s=SMALL_DRAFT, acceptance=lambda number, over: 0.8 if over < 0.5 else 0.02)
    outcome = run(given, new_policy(pipeline), 3000)
    assert outcome.rate_between(0.6, 1.0) >= 0.97 / CPU(1)


@pytest.mark.parametrize("pipeline", ["serial", "continuous"])
def test_load_that_comes_and_goes(pipeline: str) -> None:
    """Speculation pays with one seq and costs with sixteen."""
    given = World(
        verify_s=CPU,
        step_s=SMALL_DRAFT,
        acceptance=lambda number, over: 0.7,
        num_seqs=lambda over: 16 if 0.2 < over < 0.8 else 1,
    )
    outcome = run(given, new_policy(pipeline), 10_000)
    alone, _ = best_serial_rate(world(CPU, SMALL_DRAFT, 0.7), 1)
    ends = [share for share, tokens in shares_of(outcome)]
    assert outcome.rate_between(ends[0], ends[1]) >= 0.97 * 16 / CPU(16)
    assert outcome.rate_between(ends[2], 1.0) >= 0.95 * alone


def shares_of(outcome: Outcome) -> list[tuple[float, float]]:
    """The shares of the rounds after which 0.25, 0.75 and 0.85 of the tokens are committed."""
    total, num_rounds = outcome.num_tokens, len(outcome.rate_of)
    found = []
    for share in (0.25, 0.75, 0.85):
        index = next(i for i, (_, tokens) in enumerate(outcome.rate_of) if tokens >= share * total)
        found.append((index / (num_rounds - 1), share))
    return found


def test_the_policy_does_not_oscillate() -> None:
    """Where speculation hardly pays, on and off are equally good, but each change costs."""
    given = world(CPU, BIG_DRAFT, 0.22)
    outcome = Simulation(given, new_policy("serial"), num_tokens=3000).serial()
    changes = sum(bool(a) != bool(b) for a, b in pairwise(outcome.verified))
    assert changes < 0.06 * len(outcome.verified)


def drafts(acceptance: float = 0.8, *, ready: int = 0, coming: int = 0, limit: int = 8, **options: bool) -> Drafts:
    return Drafts(acceptance=acceptance, num_ready=ready, num_coming=coming, limit=limit, **options)


def taught(
    pipeline: str, *, verify_s: Law = CPU, step_s: Law = SMALL_DRAFT, adaptive: bool = True
) -> SpeculationPolicy:
    """A policy that has seen every batch size."""
    policy = new_policy(pipeline, adaptive=adaptive)
    for num_tokens in range(1, 65):
        for _ in range(4):
            policy.observe_target(num_seqs=1, num_tokens=num_tokens, num_context=0, run_s=verify_s(num_tokens))
    for _ in range(4):
        policy.observe_draft(num_seqs=1, num_steps=4, num_chunk_tokens=2, run_s=4 * step_s(1))
    return policy


def test_the_policy_works_before_anything_is_measured() -> None:
    policy = new_policy("continuous")
    assert policy.choose([drafts(ready=3)], num_other_tokens=0, num_waiting=0)[0].num_verify == 3
    assert policy.choose([], num_other_tokens=0, num_waiting=0) == []
    assert policy.draft_lengths([drafts()])[0] >= 1
    assert policy.draft_lengths([drafts(limit=0)]) == [0]


def test_holding_pays_if_a_draft_step_is_short_and_not_if_it_is_long() -> None:
    empty = [drafts(0.8, ready=0, coming=4)]
    quick = taught("continuous", step_s=line(0.0008, 0.0)).choose(empty, num_other_tokens=0, num_waiting=0)[0]
    assert 0.0008 < quick.hold_s < 0.02
    assert quick.num_verify == 0
    slow = taught("continuous", step_s=line(0.012, 0.0)).choose(empty, num_other_tokens=0, num_waiting=0)[0]
    assert slow.hold_s == 0.0


@pytest.mark.parametrize(
    "seqs",
    [
        [drafts(0.8, coming=4, may_hold=False)],
        [drafts(0.8, coming=0)],
        [drafts(0.8, coming=4), drafts(limit=0)],
    ],
    ids=["its time is up", "nothing comes", "another seq decodes anyway"],
)
def test_no_seq_is_held_in_vain(seqs: list[Drafts]) -> None:
    assert [choice.hold_s for choice in taught("continuous").choose(seqs, num_other_tokens=0, num_waiting=0)] == [
        0.0
    ] * len(seqs)


def test_prompts_in_the_round_are_not_kept_waiting() -> None:
    (choice,) = taught("continuous").choose([drafts(0.8, coming=4)], num_other_tokens=64, num_waiting=0)
    assert choice.hold_s == 0.0


def test_the_time_to_compile_kernels_does_not_count_as_drafting() -> None:
    """The first rounds take seconds because kernels compile: that must not switch drafting off."""
    policy = new_policy("serial")
    for run_s in (4.0, 2.0, *[CPU(1)] * 20):
        policy.observe_target(num_seqs=1, num_tokens=1, num_context=0, run_s=run_s)
    for run_s in (4.0, 4 * SMALL_DRAFT(1), 4 * SMALL_DRAFT(1)):
        assert policy.draft_lengths([drafts()])[0] > 0
        assert policy.pays_to_catch_up(num_seqs=1, num_behind=100, num_left=100)
        policy.observe_draft(num_seqs=1, num_steps=4, num_chunk_tokens=2, run_s=run_s)
    assert policy.draft_lengths([drafts()])[0] > 1
    assert policy.times.draft_step_s(1) < 2 * SMALL_DRAFT(1)


def test_better_seqs_get_more_drafts() -> None:
    policy = taught("serial", verify_s=line(0.010, 0.001))
    policy.choose([drafts()] * 4, num_other_tokens=0, num_waiting=1)  # nobody is probed while requests wait
    lengths = policy.draft_lengths([drafts(0.95), drafts(0.6), drafts(0.05), drafts(limit=0)])
    assert lengths[0] > lengths[1] > lengths[2] == lengths[3] == 0


def test_a_request_with_a_fixed_number_of_drafts_gets_it() -> None:
    for pipeline in ("serial", "continuous"):
        policy = taught(pipeline, verify_s=COMPUTE)
        fixed, free = drafts(0.1, limit=5, is_fixed=True), drafts(0.1)
        lengths = policy.draft_lengths([fixed, free])
        assert lengths[0] >= 5
        assert lengths[1] <= 1
        ready = [drafts(0.1, ready=5, limit=5, is_fixed=True), drafts(0.1, ready=5)]
        first, second = policy.choose(ready, num_other_tokens=0, num_waiting=0)
        assert first.num_verify == 5
        assert second.num_verify <= 1
    (held,) = policy.choose([drafts(0.1, ready=2, coming=3, limit=5, is_fixed=True)], num_other_tokens=0, num_waiting=0)
    assert held.hold_s > 0.0


def test_no_seq_misses_a_round_while_a_request_gets_its_number() -> None:
    policy = taught("continuous", verify_s=COMPUTE)
    waits, has_all = drafts(0.8, coming=5, limit=5, is_fixed=True), drafts(0.8, ready=5, limit=5, is_fixed=True)
    for choice in policy.choose([waits, has_all], num_other_tokens=0, num_waiting=0):
        assert choice.hold_s > 0.0
    for choice in policy.choose([waits, has_all], num_other_tokens=64, num_waiting=0):
        assert choice.hold_s == 0.0, "a prompt takes longer than drafts"


@pytest.mark.parametrize("pipeline", ["serial", "continuous"])
def test_more_drafts_than_in_any_round_so_far_are_fine(pipeline: str) -> None:
    """Many requests fix their number of drafts, while all rounds so far were small."""
    policy = new_policy(pipeline)
    for _ in range(10):
        policy.observe_target(num_seqs=20, num_tokens=20, num_context=100, run_s=0.1)
        policy.observe_draft(num_seqs=20, num_steps=1, num_chunk_tokens=20, run_s=0.01)
    lengths = policy.draft_lengths([drafts(0.8), *[drafts(0.8, limit=8, is_fixed=True)] * 19])
    assert min(lengths[1:]) >= 8


def test_without_adapting_everything_is_drafted_and_verified() -> None:
    policy = taught("serial", verify_s=COMPUTE, adaptive=False)
    assert policy.draft_lengths([drafts(0.01), drafts(0.9, limit=3)]) == [8, 3]
    assert [c.num_verify for c in policy.choose([drafts(0.01, ready=8)], num_other_tokens=0, num_waiting=0)] == [8]


def test_lookup_needs_no_draft_engine() -> None:
    policy = new_policy("serial")
    for num_tokens in range(1, 33):
        policy.observe_target(num_seqs=1, num_tokens=num_tokens, num_context=0, run_s=COMPUTE(num_tokens))
    good, bad = policy.choose([drafts(0.97, ready=8), drafts(0.05, ready=8)], num_other_tokens=0, num_waiting=0)
    assert good.num_verify > bad.num_verify == 0
    policy.observe_draft(num_seqs=1, num_steps=1, num_chunk_tokens=1, run_s=1e-6)
    (still_bad,) = policy.choose([drafts(0.05, ready=8)], num_other_tokens=0, num_waiting=0)
    assert still_bad.num_verify == 0


def test_a_chain_ends_where_another_draft_would_hardly_be_accepted() -> None:
    policy = taught("continuous")
    assert policy.should_extend(1.0, 0.5)
    assert policy.should_extend(0.85, 0.8)
    assert not policy.should_extend(0.002, 0.3)
    assert not policy.should_extend(0.9**40, 0.8)


def test_a_draft_catches_up_only_if_that_pays_off() -> None:
    policy = taught("serial")
    for _ in range(4):
        policy.observe_draft(num_seqs=1, num_steps=1, num_chunk_tokens=100, run_s=0.05)

    def pays(num_seqs: int = 1, num_behind: int = 100, num_left: int = 200) -> bool:
        return policy.pays_to_catch_up(num_seqs=num_seqs, num_behind=num_behind, num_left=num_left)

    assert pays()
    assert not pays(num_left=1)
    assert not pays(num_behind=10**7)
    assert not pays(num_seqs=200), "verifying drafts of so many takes longer than it saves"
    for _ in range(100):
        policy.prior.observe(0, 1)
    assert pays(), "otherwise nobody would learn when drafts become better"


def test_a_few_of_many_speculate_only_while_that_pays() -> None:
    """The draft has caught up with one seq of eight, so the time spent on its drafts saves nothing for the others."""

    def drafts_in_30_rounds(num_caught_up: int) -> int:
        policy = taught("serial", verify_s=line(0.100, 0.0002), step_s=line(0.012, 0.00002))
        num_drafts = []
        for number in range(40):
            policy.choose([drafts(0.8)] * 8, num_other_tokens=0, num_waiting=0)
            lengths = policy.draft_lengths([drafts(0.8)] * (8 if number < 10 else num_caught_up))
            num_drafts.append(sum(lengths))
            policy.prior.observe(int(any(lengths)), int(any(lengths)))
            policy.observe_target(num_seqs=8, num_tokens=8, num_context=0, run_s=0.1016)
        return sum(num_drafts[10:])

    assert drafts_in_30_rounds(8) > 300
    assert drafts_in_30_rounds(1) <= 5, "probes"


def test_a_window_is_bounded_as_configured() -> None:
    policy = ContinuousPolicy(max_drafts=8, adaptive=True, window=5)
    assert policy.draft_lengths([drafts(0.9)]) == [5]


def test_probes_wait_until_their_cost_is_saved_up() -> None:
    """The further behind the draft is, the less often a probe makes it catch up."""

    def num_probes(num_behind: int) -> int:
        policy = taught("serial", verify_s=COMPUTE)
        policy.observe_draft(num_seqs=1, num_steps=0, num_chunk_tokens=2000, run_s=0.5)
        count = 0
        for _ in range(4000):
            asleep = Drafts(acceptance=0.02, num_ready=0, num_coming=0, limit=8, num_behind=num_behind)
            if policy.draft_lengths([asleep])[0]:
                count += 1
                policy.prior.observe(0, 1)
            policy.observe_target(num_seqs=1, num_tokens=1, num_context=0, run_s=COMPUTE(1))
        return count

    often, seldom = num_probes(1), num_probes(2000)
    assert 3 <= often <= 100
    assert seldom < often


@pytest.mark.parametrize(("verify_s", "least", "most"), [(CPU, 6, 100), (line(0.0001, 0.0020), 0, 2)])
def test_probes_are_rare_if_even_the_best_drafts_would_gain_nothing(verify_s: Law, least: int, most: int) -> None:
    policy = taught("serial", verify_s=verify_s)
    num_probes = 0
    for _ in range(2000):
        if policy.draft_lengths([drafts(0.02)])[0]:
            num_probes += 1
            policy.prior.observe(0, 1)
        policy.observe_target(num_seqs=1, num_tokens=1, num_context=0, run_s=verify_s(1))
    assert least <= num_probes <= most
