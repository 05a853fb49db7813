"""Draft and target engine side by side, in simulated time. Whatever overtakes whatever, the stream is that of plain
decoding, and the target never waits longer than the policy said."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from echelon.pb import worker_pb2
from scheduler.config import Method, Pipeline
from tests.helpers.fake_group import FakeEngine, FakeModel, plain_tokens
from tests.helpers.scheduler_sim import seq_sampling, submit
from tests.helpers.timed_sim import TimedSimulation

DRAFT = worker_pb2.ENGINE_ROLE_DRAFT
SERIAL = {"pipeline": Pipeline.SERIAL}
CONTINUOUS = {"pipeline": Pipeline.CONTINUOUS}
CACHED = CONTINUOUS | {"verdict_cache_rows": 8}
TARGET_S = 0.1  # a target round
NUM_TOKENS = 300


def target_engine() -> FakeEngine:
    return FakeEngine(num_blocks=1500, num_slots=32, max_model_len=500, max_num_batched_tokens=256)


def draft_engine(agreement: int, **fields: Any) -> FakeEngine:
    defaults = {"num_blocks": 2500, "num_slots": 128, "max_model_len": 500, "max_num_batched_tokens": 256}
    model = FakeModel(agreement=agreement, foresight=70 if agreement else 0)  # useless runners-up too
    return FakeEngine(role=DRAFT, model=model, **defaults | fields)


def simulate(
    agreement: int,
    speculation: dict[str, Any],
    *,
    draft_step: float = 0.09,
    num_requests: int = 1,
    k: int = 8,
    delay_s: Callable[[], float] = lambda: 0.0004,
    **params: Any,
) -> TimedSimulation:
    """Runs to the end. `draft_step`: the time of a draft step, in target rounds."""
    sim = TimedSimulation(
        target=target_engine(),
        draft=draft_engine(agreement),
        k=k,
        speculation=speculation,
        target_s=lambda num_tokens: TARGET_S * (1 + 0.02 * (num_tokens - 1)),
        draft_s=lambda num_rows: TARGET_S * draft_step * (1 + 0.03 * (num_rows - 1)),
        delay_s=delay_s,
        may_wait=speculation["pipeline"] is Pipeline.SERIAL,
    )
    messages = [submit(f"r{i}", [i + 1] * 9, seed=i, max_tokens=NUM_TOKENS, **params) for i in range(num_requests)]
    for message in messages:
        sim.submit(message)
    sim.run_timed()
    for message in messages:
        sim.assert_plain(message)
    sim.assert_all_free()
    return sim


def best_fixed_serial_s(agreement: int, draft_step: float) -> float:
    return min(simulate(agreement, SERIAL, draft_step=draft_step, num_speculative_tokens=k).now for k in range(1, 9))


@pytest.mark.parametrize(("draft_step", "plain", "cached"), [(0.09, 1.0, 1.15), (0.22, 1.1, 1.15)])
def test_continuous_beats_serial_at_its_best(draft_step: float, plain: float, cached: float) -> None:
    serial_s = best_fixed_serial_s(80, draft_step)
    assert serial_s / simulate(80, CONTINUOUS, draft_step=draft_step).now >= plain
    assert serial_s / simulate(80, CACHED, draft_step=draft_step).now >= cached


@pytest.mark.parametrize("speculation", [CONTINUOUS, CACHED], ids=["continuous", "cached"])
def test_a_useless_draft_costs_next_to_nothing_and_pauses(speculation: dict[str, Any]) -> None:
    plain = simulate(0, speculation, enabled=False)
    useless = simulate(0, speculation | {"adaptive": True})
    assert useless.now <= 1.03 * plain.now
    assert useless.draft_lane.busy_s < 0.1 * useless.now, "a draft that keeps running slows the target"


def test_the_target_never_stands_idle_when_the_draft_is_perfect() -> None:
    sim = simulate(100, CONTINUOUS)
    assert sim.target_lane.busy_s > 0.97 * sim.now


@pytest.mark.parametrize("speculation", [CONTINUOUS, CACHED], ids=["continuous", "cached"])
def test_the_draft_does_not_stand_idle_while_its_answers_travel(speculation: dict[str, Any]) -> None:
    """Here a message takes as long as a step, each way. With one round at a time the draft would be idle for two steps
    of three, and the target, which has nothing else to do, for much of that time."""
    sim = simulate(90, speculation, draft_step=0.4, delay_s=lambda: 0.4 * TARGET_S)
    assert sim.draft_lane.busy_s > 0.6 * sim.now


def test_nothing_is_drafted_that_a_verdict_has_made_useless() -> None:
    sim = simulate(60, CACHED, draft_step=0.3)
    assert sim.draft is not None
    assert sim.draft.num_overtaken > 20


def test_most_mismatches_are_foreseen_when_the_second_choice_is_right() -> None:
    foreseeing = simulate(80, CACHED)
    status = foreseeing.core.status()
    assert status.verdict_cache_hits_total > status.verdict_cache_misses_total
    assert foreseeing.now < simulate(80, CONTINUOUS).now


@pytest.mark.parametrize("speculation", [SERIAL, CONTINUOUS, CACHED], ids=["serial", "continuous", "cached"])
def test_every_draft_counts_as_used_or_wasted(speculation: dict[str, Any]) -> None:
    perfect, useless = simulate(100, speculation).core.status(), simulate(0, speculation).core.status()
    assert useless.wasted_draft_tokens_total == useless.draft_tokens_total > 0
    assert perfect.wasted_draft_tokens_total < 0.3 * perfect.draft_tokens_total, "the end, and branches"
    assert (
        perfect.speculation_total.num_accepted_tokens <= perfect.draft_tokens_total - perfect.wasted_draft_tokens_total
    )


def test_committed_tokens_are_calibrated() -> None:
    """In a layer-parallel draft, the KV of accepted drafts is approximate until it has been computed again."""
    sim = TimedSimulation(target=target_engine(), draft=draft_engine(90, lp_size=4), k=4, speculation=CACHED)
    message = submit("r", [1] * 9, max_tokens=200)
    sim.submit(message)
    num_left: list[int] = []
    sim.at(3.0, lambda: num_left.extend(slot.num_computed - slot.num_exact for slot in sim.draft.slots.values()))
    sim.run_timed()
    assert sim.core.status().speculation_total.num_accepted_tokens > 100
    assert min(num_left) <= 12, "one slot holds the history: only its chain is approximate"
    again = submit("again", [1] * 9 + sim.tokens["r", 0][:150], max_tokens=5)
    sim.submit(again)
    sim.run_timed()
    sim.assert_plain(again)


def test_concurrent_requests_keep_both_engines_busy() -> None:
    serial, continuous = (simulate(80, mode, num_requests=8, k=4) for mode in (SERIAL, CONTINUOUS))
    assert continuous.now < serial.now
    assert continuous.target_lane.busy_s > 0.9 * continuous.now


@pytest.mark.parametrize("speculation", [SERIAL, CONTINUOUS, CACHED], ids=["serial", "continuous", "cached"])
@pytest.mark.parametrize("seed", range(12))
def test_any_timing_gives_the_plain_stream(seed: int, speculation: dict[str, Any]) -> None:
    """Random durations and delays: drafts, verdicts and results overtake each other in every order."""
    rng = random.Random(seed)
    sim = TimedSimulation(
        target=FakeEngine(num_blocks=rng.choice([40, 400]), num_slots=8, max_model_len=90),
        draft=draft_engine(
            rng.choice([50, 80, 95]),
            lp_size=rng.choice([1, 4]),
            num_blocks=rng.choice([40, 400]),
            num_slots=rng.choice([4, 64]),
            max_model_len=(90, 40, 20, 8)[seed % 4],  # a seq that outgrows the draft continues without it
        ),
        k=rng.randint(1, 6),
        speculation=speculation | {"adaptive": rng.random() < 0.5},
        target_s=lambda num_tokens: rng.uniform(0.01, 0.2),
        draft_s=lambda num_rows: rng.choice([0.001, 0.02, 0.3]),
        delay_s=lambda: rng.choice([0.0, 0.001, 0.1]),
        may_wait=speculation is SERIAL,
    )
    messages = [submit(f"r{i}", [i % 3] * 11 + [i], seed=i, max_tokens=60) for i in range(6)]
    for i, message in enumerate(messages):
        sim.at(rng.uniform(0.0, 3.0), lambda message=message: sim.submit(message))
        if i == 2:
            sim.at(rng.uniform(0.0, 4.0), lambda: sim.core.adjust("r0", params(rng)))
    sim.run_timed()
    for message in messages:
        sim.assert_plain(message)
        assert len(sim.tokens[message.request_id, 0]) == 60
    sim.assert_all_free()


def params(rng: random.Random) -> Any:
    return submit("", [1], **rng.choice([{"enabled": False}, {"num_speculative_tokens": 2}, {}])).speculation


@pytest.mark.parametrize("speculation", [CONTINUOUS, CACHED], ids=["continuous", "cached"])
@pytest.mark.parametrize("lost_at", [round(0.013 + 0.037 * i, 3) for i in range(24)])
def test_losing_the_draft_at_any_point_only_costs_speed(lost_at: float, speculation: dict[str, Any]) -> None:
    sim = TimedSimulation(target=target_engine(), draft=draft_engine(80), k=5, speculation=speculation)
    message = submit("r", [1] * 9, max_tokens=80)
    sim.submit(message)
    sim.at(lost_at, sim.lose_draft)
    sim.at(lost_at + 0.25, sim.bring_draft_back)
    sim.run_timed()
    sim.assert_plain(message)
    assert len(sim.tokens["r", 0]) == 80
    assert sim.core.status().speculation_total.num_accepted_tokens > 10, "it drafts again"
    sim.assert_all_free()


def test_a_request_changes_its_speculation_while_it_runs() -> None:
    sim = TimedSimulation(target=target_engine(), draft=draft_engine(100), k=4, speculation=CONTINUOUS)
    message = submit("r", [1] * 9, max_tokens=120)
    sim.submit(message)
    accepted: list[int] = []

    def switch(enabled: bool) -> None:
        accepted.append(sim.core.status().speculation_total.num_accepted_tokens)
        sim.core.adjust("r", submit("", [1], enabled=enabled).speculation)

    sim.at(1.0, lambda: switch(False))
    sim.at(3.0, lambda: switch(True))
    sim.run_timed()
    sim.assert_plain(message)
    before, meanwhile = accepted
    assert before > 0
    assert meanwhile - before <= 4, "at most the row that was on its way"
    assert sim.core.status().speculation_total.num_accepted_tokens > meanwhile


@pytest.mark.parametrize("speculation", [CONTINUOUS, CACHED], ids=["continuous", "cached"])
def test_a_request_switches_the_level_beneath_the_draft(speculation: dict[str, Any]) -> None:
    sim = TimedSimulation(target=target_engine(), draft=draft_engine(80), k=4, speculation=speculation)
    rounds, seconds = list[worker_pb2.Round](), sim.draft_lane.seconds

    def note(message: worker_pb2.Round) -> float:
        rounds.append(message)
        return seconds(message)

    sim.draft_lane.seconds = note
    sim.submit(submit("r", [1] * 9, max_tokens=80, lower_draft=False))
    sim.at(1.0, lambda: sim.core.adjust("r", submit("", [1]).speculation))
    sim.run_timed()
    without = [row.without_lower for message in rounds for row in message.rows]
    assert without == sorted(without, reverse=True), "every row until the change, and none after it"
    assert any(without)
    assert not all(without)


def repetitive(seed: int) -> list[int]:
    """A prompt that repeats the same tokens over and over."""
    return [(7 * i + seed) % 40 for i in range(12)] * 4


@pytest.mark.parametrize("pipeline", [Pipeline.SERIAL, Pipeline.CONTINUOUS])
@pytest.mark.parametrize("method", [Method.SUFFIX, Method.HYBRID])
def test_lookup_finds_earlier_text(method: Method, pipeline: Pipeline) -> None:
    """The second of two equal requests gets its drafts from the first one's output, however good the draft model is."""
    sim = TimedSimulation(
        target=target_engine(),
        draft=draft_engine(30),
        k=6,
        speculation={"method": method, "pipeline": pipeline, "adaptive": True},
        may_wait=pipeline is Pipeline.SERIAL,
        looks_up=True,
        max_num_seqs=1,
    )
    for name in ("first", "second"):
        sim.submit(submit(name, repetitive(1), max_tokens=60))
    sim.run_timed()
    for name in ("first", "second"):
        sim.assert_plain(submit(name, repetitive(1)))
    first, second = (sim.completed[name].speculation for name in ("first", "second"))
    assert second.num_rounds < 0.5 * first.num_rounds
    assert second.num_accepted_tokens >= 35
    sim.assert_all_free()


def test_a_token_that_the_draft_does_not_know_ends_its_drafts() -> None:
    """The target's vocabulary may be longer than the draft's: a token of its padding can be drawn, or forced by a
    bias."""
    engine = draft_engine(80)
    engine.model = FakeModel(agreement=80, vocab_size=39)
    sim = TimedSimulation(target=target_engine(), draft=engine, k=4, speculation=CACHED, looks_up=True)
    message = submit("r", [1] * 9, max_tokens=150)
    sim.submit(message)
    sim.run_timed()
    sim.assert_plain(message)
    assert 39 in sim.tokens["r", 0]
    sim.assert_all_free()


@pytest.mark.parametrize("seed", range(6))
def test_a_branch_without_drafts_is_dropped(seed: int) -> None:
    """A branch that ends in non-finite logits must neither grow nor replace the chain."""
    message = submit("r", [1] * 9, seed=seed, max_tokens=120)
    truth = plain_tokens([1] * 9, seq_sampling(message), 120)
    engine = draft_engine(50)
    engine.model = FakeModel(agreement=50, bad_prefix=tuple(truth[60:62]))
    sim = TimedSimulation(target=target_engine(), draft=engine, k=5, speculation=CACHED)
    sim.submit(message)
    sim.run_timed()
    sim.assert_plain(message)
    sim.assert_all_free()


@pytest.mark.parametrize("seed", range(4))
def test_branches_end_with_the_context(seed: int) -> None:
    """No branch takes more blocks than a seq of max_model_len has."""
    sim = TimedSimulation(
        target=FakeEngine(num_blocks=400, max_model_len=88),
        draft=draft_engine(60, max_model_len=88),
        k=6,
        speculation=CACHED,
        draft_s=lambda num_rows: 0.0004,
        delay_s=lambda: 0.0,
    )
    messages = [submit(f"r{i}", [i + 1] * 9, seed=10 * seed + i, max_tokens=300) for i in range(6)]
    for message in messages:
        sim.submit(message)
    sim.run_timed()
    for message in messages:
        sim.assert_plain(message)
        assert len(sim.tokens[message.request_id, 0]) == 79
    sim.assert_all_free()


@pytest.mark.parametrize("speculation", [SERIAL, CONTINUOUS, CACHED], ids=["serial", "continuous", "cached"])
def test_rounds_are_queued_while_drafts_do_not_pay_and_drafts_return_when_they_do(
    speculation: dict[str, Any],
) -> None:
    """With many seqs the target is bound by computation, so a draft costs as much as a token; then one seq is left."""
    sim = TimedSimulation(
        target=target_engine(),
        draft=draft_engine(80),
        k=4,
        speculation=speculation | {"adaptive": True},
        target_s=lambda num_tokens: 0.01 * max(10, num_tokens),
        draft_s=lambda num_rows: 0.01,
        delay_s=lambda: 0.02,
        may_wait=True,
        max_num_seqs=24,
    )
    messages = [submit(f"r{i}", [i + 1] * 9, seed=i, max_tokens=100 if i else 300) for i in range(24)]
    for message in messages:
        sim.submit(message)
    num_verified: list[int] = []
    busy_s: list[float] = []
    for time_s in (10.5, 20.0):
        sim.at(time_s, lambda: busy_s.append(sim.target_lane.busy_s))
    sim.at(24.0, lambda: num_verified.append(sim.core.status().speculation_total.num_draft_tokens))
    sim.run_timed()
    for message in messages:
        sim.assert_plain(message)
    if speculation is SERIAL:
        assert busy_s[1] - busy_s[0] > 0.97 * 9.5, "of the time in which all run"
    assert sim.core.status().speculation_total.num_draft_tokens > num_verified[0] + 100, "when one is left"


def test_drafts_of_a_released_slot_do_not_count_for_the_next_one() -> None:
    """Serial: speculation is switched off and on again while the seq's drafts are in flight."""
    sim = TimedSimulation(
        target=target_engine(),
        draft=draft_engine(60),
        k=4,
        speculation=SERIAL,
        target_s=lambda num_tokens: 0.01,
        draft_s=lambda num_rows: 0.03,
        delay_s=lambda: 0.0,
        may_wait=True,
    )
    message = submit("r", [1] * 9, max_tokens=60)
    sim.submit(message)
    for time, change in [
        (0.3, {"enabled": False}),
        (0.3001, {"num_speculative_tokens": 2}),
        (0.395, {"num_speculative_tokens": 4}),
    ]:
        sim.at(time, lambda change=change: sim.core.adjust("r", submit("", [1], **change).speculation))
    sim.run_timed()
    sim.assert_plain(message)
    sim.assert_all_free()


def test_no_seq_waits_for_drafts_that_have_no_room() -> None:
    """The draft engine has room for some of the seqs only: the target does not wait for drafts of the others."""
    sim = TimedSimulation(target=target_engine(), draft=draft_engine(90, num_blocks=60), k=8, speculation=CONTINUOUS)
    messages = [submit(f"r{i}", [i + 1] * 9, seed=i, max_tokens=100) for i in range(6)]
    for message in messages:
        sim.submit(message)
    sim.run_timed()
    for message in messages:
        sim.assert_plain(message)
    assert sim.target_lane.busy_s > 0.97 * sim.now


def test_a_held_seq_does_not_wait_for_a_newcomers_prompt() -> None:
    sim = TimedSimulation(
        target=target_engine(), draft=draft_engine(70), k=8, speculation=CONTINUOUS, draft_s=lambda num_rows: 0.02
    )
    for i in range(2):
        sim.submit(submit(f"r{i}", [i + 1] * 9, seed=i, max_tokens=300, num_speculative_tokens=4))
    for i in range(40):
        prompt = submit(f"late{i}", [i % 30 + 1] * 200, seed=i, max_tokens=2)
        sim.at(2.0 + 0.137 * i, lambda prompt=prompt: sim.submit(prompt))
    plan_target = sim.core.plan_target
    olds: set[int] = set()  # slots of the two

    def plan(now: float) -> worker_pb2.Round | None:
        message = plan_target(now)
        if message is not None:
            olds.update(seq.slot for seq in message.init_seqs if seq.num_prompt_tokens == 9)
            has_prompt = any(row.chunk_len > 2 for row in message.rows)
            both_run = len(olds) == 2 and not {"r0", "r1"} & sim.completed.keys()
            assert not (has_prompt and both_run) or olds <= {row.slot for row in message.rows}
        return message

    sim.core.plan_target = plan  # type: ignore[method-assign]
    sim.run_timed()
    assert len(olds) == 2


def test_a_request_gets_its_number_of_drafts_even_if_few_are_accepted() -> None:
    sim = simulate(10, CONTINUOUS | {"adaptive": True}, num_speculative_tokens=6)
    stats = sim.completed["r0"].speculation
    assert stats.num_draft_tokens > 5.5 * stats.num_drafts


def test_the_target_alone_is_asked_for_logprobs() -> None:
    """They would only make drafts slower. The fake draft engine refuses them."""
    assert simulate(80, SERIAL, logprobs=1).completed["r0"].speculation.num_drafts > 0


def test_the_drafts_confidence_shows_where_a_verdict_will_leave_the_chain() -> None:
    """The draft is sure of most of its drafts, and they are right; the others are a coin toss. Branches start at
    these."""
    runs = []
    for knows_its_doubts in (True, False):
        engine = draft_engine(80)
        engine.model = FakeModel(agreement=80, foresight=100, knows_its_doubts=knows_its_doubts)
        speculation = CONTINUOUS | {"verdict_cache_rows": 2}
        sim = TimedSimulation(target=target_engine(), draft=engine, k=6, speculation=speculation)
        sim.submit(submit("r", [1] * 9, seed=3, max_tokens=300))
        sim.run_timed()
        runs.append(sim.core.status())
    knowing, guessing = runs
    assert knowing.verdict_cache_hits_total > 1.1 * guessing.verdict_cache_hits_total
