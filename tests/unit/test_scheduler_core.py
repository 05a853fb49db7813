"""Streams from the scheduler are those of plain decoding, whatever happens on the way."""

import random
import re
from typing import Any

import pytest
from grpc import StatusCode

from echelon.pb import inference_pb2, worker_pb2
from scheduler.config import Pipeline
from scheduler.errors import UnexpectedAnswerError
from tests.helpers.fake_group import FakeEngine, FakeModel, plain_tokens
from tests.helpers.scheduler_sim import Simulation, letters, seq_sampling, submit

DRAFT = worker_pb2.ENGINE_ROLE_DRAFT


def draft_engine(agreement: int = 70, **fields: Any) -> FakeEngine:
    return FakeEngine(role=DRAFT, model=FakeModel(agreement=agreement), **fields)


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(40) for _ in range(length)]


def only_finish(sim: Simulation, request_id: str) -> inference_pb2.Finished:
    (finished,) = sim.completed[request_id].finished
    return finished


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("speculate", [False, True])
def test_streams_equal_those_of_plain_decoding(depth: int, speculate: bool) -> None:
    sim = Simulation(draft=draft_engine() if speculate else None, max_rounds_in_flight=depth)
    messages = [submit(f"r{i}", prompt(i, 5 + 7 * i), seed=i, max_tokens=10 + i) for i in range(6)]
    for message in messages:
        sim.submit(message)
    sim.run()
    for i, message in enumerate(messages):
        sim.assert_plain(message)
        assert len(sim.tokens[message.request_id, 0]) == 10 + i
        assert sim.text[message.request_id, 0] == letters(sim.tokens[message.request_id, 0])
        assert only_finish(sim, message.request_id).reason == inference_pb2.FINISH_REASON_LENGTH
    sim.assert_all_free()


def random_simulation(rng: random.Random, speculation: dict[str, Any]) -> Simulation:
    draft = None
    if rng.random() < 0.7:
        draft = draft_engine(
            rng.choice([0, 50, 90, 100]),
            num_blocks=rng.choice([6, 20, 64]),
            num_slots=rng.choice([1, 8, 24]),
            lp_size=rng.choice([1, 4]),
        )
    target = FakeEngine(num_blocks=rng.choice([16, 24, 64]), num_slots=rng.choice([2, 8]), max_model_len=64)
    return Simulation(
        target=target,
        draft=draft,
        k=rng.randint(1, 6),
        speculation=speculation if draft else None,
        max_num_batched_tokens=rng.choice([8, 16, 64]),
        max_rounds_in_flight=rng.choice([1, 2]),
        enable_prefix_caching=rng.random() < 0.8,
        keeps_requests=True,
    )


def random_submit(rng: random.Random, number: int) -> Any:
    shared = prompt(rng.randrange(2), 24)
    fields: dict[str, Any] = {"seed": rng.randrange(3), "max_tokens": rng.randint(1, 40), "n": rng.choice([1, 1, 1, 3])}
    if rng.random() < 0.3:
        fields |= {"stop_token_ids": [rng.randrange(40)], "min_tokens": rng.randrange(4)}
    if rng.random() < 0.3:
        fields["enabled"] = rng.random() < 0.5
    if rng.random() < 0.3:
        fields["num_speculative_tokens"] = rng.randrange(5)
    fields["is_background"] = rng.random() < 0.3
    return submit(f"r{number}", shared[: rng.randint(1, 24)] + prompt(number, rng.randint(1, 12)), **fields)


def lose_target_for_a_while(sim: Simulation, rng: random.Random) -> None:
    """What the draft does and the clients want goes on meanwhile."""
    sim.lose_target()
    for number in range(rng.randrange(4)):
        sim.submit(submit(f"meanwhile-{number}-{sim.target.incarnation}", prompt(number, 9)))
        sim.step(rng)
    sim.return_target()


PIPELINES: list[dict[str, Any]] = [
    {"pipeline": Pipeline.SERIAL},
    {"pipeline": Pipeline.SERIAL, "adaptive": True},
    {"pipeline": Pipeline.CONTINUOUS},
    {"pipeline": Pipeline.CONTINUOUS, "verdict_cache_rows": 6},
    {"pipeline": Pipeline.CONTINUOUS, "verdict_cache_rows": 3, "adaptive": True, "window": 5},
]


@pytest.mark.parametrize("speculation", PIPELINES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_any_schedule_gives_the_plain_stream(seed: int, speculation: dict[str, Any]) -> None:
    """Chunks, prefix hits, preemption, draft lengths, cancels, and lost drafts, targets and schedulers come in random
    order."""
    rng = random.Random(seed)
    sim = random_simulation(rng, speculation)
    messages = [random_submit(rng, i) for i in range(14)]
    waiting = list(messages)
    while waiting or sim.core.num_requests:
        if waiting and rng.random() < 0.3:
            sim.submit(waiting.pop())
        if rng.random() < 0.02:
            sim.cancel(rng.choice(messages).request_id)
        if sim.draft and rng.random() < 0.01:
            sim.reconnect_draft()
        if rng.random() < 0.02:
            lose_target_for_a_while(sim, rng)
        if rng.random() < 0.01:
            sim.lose_scheduler()
        assert sim.step(rng) or waiting or not sim.core.num_requests, "stuck"
    sim.run(rng)
    for message in messages:
        for index in range(message.sampling.n):
            sim.assert_plain(message, index)
        if (failed := sim.failed.get(message.request_id)) is not None:
            assert "is not tried again" in failed.message, "three losses while it ran, by chance"
            continue
        for finished in sim.completed[message.request_id].finished:
            check_end(sim, message, finished)
    sim.assert_all_free()


@pytest.mark.parametrize("speculation", PIPELINES[:2], ids=str)
@pytest.mark.parametrize("seed", range(16))
def test_the_target_waits_for_a_draft_that_catches_up_with_a_prompt_and_never_in_vain(
    seed: int, speculation: dict[str, Any]
) -> None:
    """Serial: the draft computes prompts in several rounds, while requests come, end and change their settings, and the
    draft is lost."""
    rng = random.Random(seed)
    sim = Simulation(
        target=FakeEngine(num_blocks=rng.choice([64, 400]), num_slots=8, max_model_len=160),
        draft=draft_engine(
            rng.choice([0, 60, 100]),
            num_blocks=rng.choice([64, 400]),
            num_slots=rng.choice([3, 16]),
            max_model_len=160,
            max_num_batched_tokens=rng.choice([16, 64]),
        ),
        k=rng.randint(1, 6),
        speculation=speculation,
        max_rounds_in_flight=rng.choice([1, 2]),
    )
    messages = [submit(f"r{i}", prompt(i, rng.randint(20, 100)), seed=i, max_tokens=40) for i in range(12)]
    waiting = list(messages)
    while waiting or sim.core.num_requests:
        if waiting and rng.random() < 0.1:
            sim.submit(waiting.pop())
        name = rng.choice(messages).request_id
        match rng.randrange(60):
            case 0:
                sim.cancel(name)
            case 1:
                sim.core.adjust(name, submit("", [1], enabled=False).speculation)
            case 2:
                sim.core.adjust(name, submit("", [1], num_speculative_tokens=rng.randint(1, 3)).speculation)
            case 3:
                sim.reconnect_draft()
        assert sim.step(rng) or waiting or not sim.core.num_requests, "stuck"
    for message in messages:
        sim.assert_plain(message)
    sim.assert_all_free()


def check_end(sim: Simulation, message: Any, finished: inference_pb2.Finished) -> None:
    tokens = sim.tokens.get((message.request_id, finished.index), [])
    sampling = message.sampling
    stops = [t in sampling.stop_token_ids and i >= sampling.min_tokens for i, t in enumerate(tokens)]
    room = min(sampling.max_tokens, sim.target.max_model_len - len(message.prompt_token_ids))
    assert finished.num_tokens == len(tokens)
    assert not any(stops[:-1])
    if finished.reason == inference_pb2.FINISH_REASON_STOP:
        assert stops[-1]
        assert finished.stop_token_id == tokens[-1]
    elif finished.reason == inference_pb2.FINISH_REASON_LENGTH:
        assert len(tokens) == room


def test_a_thousand_cancels_leak_nothing() -> None:
    rng = random.Random(7)
    sim = Simulation(draft=draft_engine(80, num_blocks=40), target=FakeEngine(num_blocks=40))
    for i in range(1000):
        sim.submit(submit(f"r{i}", prompt(i % 5, rng.randint(1, 30)), max_tokens=40, n=rng.choice([1, 2])))
        for _ in range(rng.randrange(4)):
            sim.step(rng)
        sim.cancel(f"r{rng.randint(max(0, i - 4), i)}")
    for i in range(1000):
        sim.cancel(f"r{i}")
    sim.run(rng)
    sim.assert_all_free()
    reasons = {f.reason for done in sim.completed.values() for f in done.finished}
    assert inference_pb2.FINISH_REASON_ABORT in reasons
    # The slots are free too: as many seqs as fit run at once.
    for i in range(sim.target.num_slots):
        sim.submit(submit(f"last{i}", prompt(i, 4), max_tokens=8))
    sim.step()
    assert sim.core.status().num_requests_running == sim.target.num_slots


def test_perfect_drafts_are_all_accepted_and_counted() -> None:
    sim = Simulation(draft=draft_engine(100), k=3)
    message = submit("r", prompt(1, 9), max_tokens=13)
    sim.submit(message)
    sim.run()
    sim.assert_plain(message)
    stats = sim.completed["r"].speculation
    # The prompt's round commits 1 token, then each verifies 3 drafts and commits 4.
    assert stats.num_rounds == 4
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 9, 9)
    assert list(stats.accepted_per_position) == [3, 3, 3]
    status = sim.core.status()
    assert status.speculation_total == stats
    assert (status.acceptance_rate, status.drafts_per_verification) == (1.0, 3.0)


def test_acceptance_is_that_of_the_draft_model() -> None:
    """A draft engine with an error anywhere in its history would hardly ever agree."""
    sim = Simulation(draft=draft_engine(70), k=4)
    for i in range(30):
        sim.submit(submit(f"r{i}", prompt(i, 10), seed=i, max_tokens=60))
    sim.run()
    stats = [done.speculation for done in sim.completed.values()]
    first = sum(s.accepted_per_position[0] for s in stats) / sum(s.num_drafts for s in stats)
    assert 0.6 < first < 0.8


@pytest.mark.parametrize(
    ("params", "expected_k"), [({"enabled": False}, 0), ({"num_speculative_tokens": 2}, 2), ({}, 4)]
)
def test_a_request_sets_its_own_speculation(params: dict[str, Any], expected_k: int) -> None:
    sim = Simulation(draft=draft_engine(0), k=4)
    sim.submit(submit("r", prompt(1, 9), max_tokens=20, **params))
    sim.run()
    stats = sim.completed["r"].speculation
    assert len(stats.accepted_per_position) == expected_k


def test_speculation_ends_and_resumes_with_the_draft_group() -> None:
    sim = Simulation(draft=draft_engine(100), k=4)
    assert sim.draft is not None
    message = submit("r", prompt(1, 9), max_tokens=60)
    sim.submit(message)
    while not sim.core.status().speculation_total.num_accepted_tokens:
        sim.step()
    sim.core.disconnect_draft()
    sim.draft_rounds.clear()
    before = sim.core.status()
    for _ in range(6):
        sim.step()
    after = sim.core.status()
    assert after.generation_tokens_total > before.generation_tokens_total
    assert after.draft_tokens_total == before.draft_tokens_total
    sim.draft.reset()
    sim.core.connect_draft(sim.draft.info, sim.draft.incarnation)
    sim.run()
    assert sim.core.status().speculation_total.num_accepted_tokens > after.speculation_total.num_accepted_tokens
    sim.assert_plain(message)


@pytest.mark.parametrize("draft_vocab_size", [30, 50])
def test_a_padding_token_of_one_vocabulary_is_not_shown_to_the_other_model(draft_vocab_size: int) -> None:
    sim = Simulation(draft=FakeEngine(role=DRAFT, model=FakeModel(vocab_size=draft_vocab_size)))
    message = submit("r", [*prompt(1, 9), 39], max_tokens=60)
    sim.submit(message)
    sim.run()
    sim.assert_plain(message)
    sim.assert_all_free()
    assert bool(sim.core.status().draft_tokens_total) == (draft_vocab_size > 39)


def test_a_seq_longer_than_the_drafts_context_continues_without_drafts() -> None:
    draft = draft_engine(max_model_len=60, max_num_batched_tokens=8)
    sim = Simulation(draft=draft)
    message = submit("r", prompt(1, 50), max_tokens=70)
    sim.submit(message)
    while not sim.draft_rounds:
        sim.plan()
    while len(sim.tokens.get(("r", 0), [])) < 12:  # the draft is still busy with the prompt
        sim.plan()
        sim.run_target_round()
    sim.run()
    sim.assert_plain(message)
    assert len(sim.tokens["r", 0]) == 70
    sim.assert_all_free()


def test_the_first_token_does_not_wait_for_the_draft() -> None:
    sim = Simulation(draft=draft_engine(100))
    sim.submit(submit("r", prompt(1, 60), max_tokens=5))
    sim.plan()
    assert sim.draft_rounds, "the draft engine starts on the prompt beside the target"
    while not sim.tokens:
        sim.plan()
        sim.run_target_round()  # no draft round runs
    sim.plan()
    assert sim.target_rounds, "the seq decodes on without drafts"


def test_one_drafting_round_serves_seqs_that_were_waiting_and_one_that_has_just_caught_up() -> None:
    """Serial: the target waits for every drafting round."""
    sim = Simulation(draft=draft_engine(), k=3)
    messages = [submit("old", prompt(1, 9), max_tokens=30), submit("new", prompt(2, 60), max_tokens=30)]
    sim.submit(messages[0])
    while not sim.core.status().draft_tokens_total:
        sim.step()
    sim.submit(messages[1])
    num_drafting = 0  # drafting rounds since the last target round
    while sim.core.num_requests == 2:
        sim.plan()
        if sim.target_rounds:  # the target's round first, so that it computes the prompt while the draft catches up
            assert num_drafting <= 1, "two rounds one after another"
            num_drafting = 0
            sim.run_target_round()
        else:
            num_drafting += any(row.num_draft_tokens for row in sim.draft_rounds[0].rows)
            sim.run_draft_round()
    sim.run()
    for message in messages:
        sim.assert_plain(message)


def test_two_rounds_are_in_flight_when_nobody_speculates() -> None:
    sim = Simulation()
    sim.submit(submit("r", prompt(1, 9), max_tokens=9))
    sim.plan()
    assert len(sim.target_rounds) == 1, "nothing is queued behind a round that computes a prompt"
    sim.run_target_round()
    sim.plan()
    assert [list(r.rows[0].append_token_ids) for r in sim.target_rounds] == [[], []]


def test_rounds_in_flight_do_not_overrun_the_end() -> None:
    """max_tokens is known in advance: no row is sent for a token that nobody gets."""
    sim = Simulation()
    sim.submit(submit("r", prompt(1, 9), max_tokens=3))
    sim.run()
    assert sim.target.num_rounds == 3
    assert sim.target.num_tokens == 9 + 2


def test_a_prefix_is_computed_once() -> None:
    sim = Simulation()
    shared = prompt(1, 24)
    sim.submit(submit("first", shared, max_tokens=1))
    sim.run()
    before = sim.target.num_tokens
    sim.submit(submit("again", shared, max_tokens=1))
    sim.run()
    assert sim.completed["again"].usage.cached_prompt_tokens == 20, "the block of the last token is computed again"
    assert sim.target.num_tokens == before + 4
    sim.assert_plain(submit("again", shared, max_tokens=1))
    assert sim.core.status().prefix_cache_hits == 20


def test_a_prompt_that_is_cached_but_for_its_last_token_runs_at_once() -> None:
    sim = Simulation()
    for request_id in ("first", "again"):
        sim.submit(submit(request_id, prompt(1, 21), max_tokens=1))
        sim.run()
    assert sim.completed["again"].usage.cached_prompt_tokens == 20


def test_samples_share_the_prompt() -> None:
    sim = Simulation()
    message = submit("r", prompt(1, 21), n=4, max_tokens=6)
    sim.submit(message)
    sim.run()
    assert sim.target.num_tokens == 21 + 3 * 1 + 4 * 5
    streams = set()
    for index in range(4):
        sim.assert_plain(message, index)
        streams.add(tuple(sim.tokens["r", index]))
    assert len(streams) == 4, "each sample has noise of its own"
    usage = sim.completed["r"].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (21, 24)


def test_a_round_that_is_late_counts_like_any_other() -> None:
    sim = Simulation()
    message = submit("r", prompt(1, 9), max_tokens=20)
    sim.submit(message)
    for seconds in [0.01] * 6 + [1000.0]:
        sim.plan()
        sim.now += seconds
        sim.run_target_round()
    sim.run()
    assert len(sim.tokens["r", 0]) == 20
    sim.assert_plain(message)
    sim.assert_all_free()


def test_blocks_running_out_preempts_the_youngest_and_loses_nothing() -> None:
    sim = Simulation(target=FakeEngine(num_blocks=20, max_model_len=64))
    messages = [submit(f"r{i}", prompt(i, 16), max_tokens=30) for i in range(3)]
    for message in messages:
        sim.submit(message)
    sim.run()
    assert sim.core.status().num_preemptions_total > 0
    for message in messages:
        sim.assert_plain(message)
        assert len(sim.tokens[message.request_id, 0]) == 30
    assert sim.ended_at["r0"] <= sim.ended_at["r2"]


def test_a_verdict_for_a_preempted_seq_commits_before_the_seq_comes_back() -> None:
    sim = Simulation(target=FakeEngine(num_blocks=6, max_model_len=24))
    older, younger = submit("older", prompt(1, 8), max_tokens=2), submit("younger", prompt(2, 11), max_tokens=8)
    sim.submit(older)
    sim.submit(younger)
    sim.plan()
    sim.run_target_round()
    sim.plan()  # one round in flight, and no block for the younger one's next token
    assert (len(sim.target_rounds), sim.core.status().num_preemptions_total) == (1, 1)
    sim.cancel("older")  # now there is room, but the verdict is still in flight
    sim.plan()
    sim.run()
    sim.assert_plain(younger)
    assert len(sim.tokens["younger", 0]) == 8
    sim.assert_all_free()


def test_a_full_queue_refuses_with_numbers() -> None:
    sim = Simulation(max_queue=2)
    for i in range(3):
        sim.submit(submit(f"r{i}", prompt(i, 4)))
    assert sim.failed["r2"].code == StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "max_queue 2" in sim.failed["r2"].message
    sim.run()
    assert set(sim.completed) == {"r0", "r1"}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (submit("r", []), "prompt_token_ids is empty"),
        (submit("r", [1] * 128), "max_model_len 128"),
        (submit("r", [1], max_tokens=0), "max_tokens must be >= 1"),
    ],
)
def test_requests_that_can_never_run_are_refused(message: Any, words: str) -> None:
    sim = Simulation()
    sim.submit(message)
    assert sim.failed["r"].code == StatusCode.INVALID_ARGUMENT.value[0]
    assert words in sim.failed["r"].message


def test_the_scheduler_has_no_sampling_defaults_of_its_own() -> None:
    message = submit("r", [1])
    message.sampling.ClearField("temperature")
    sim = Simulation()
    sim.submit(message)
    assert sim.failed["r"].message == "sampling.temperature is not set: the gateway fills in every default"


def test_a_request_id_is_unique_among_running_requests() -> None:
    sim = Simulation()
    sim.submit(submit("r", prompt(1, 4)))
    sim.submit(submit("r", prompt(2, 4)))
    assert sim.failed["r"].code == StatusCode.ALREADY_EXISTS.value[0]
    sim.ended_at.clear()
    sim.run()
    sim.assert_plain(submit("r", prompt(1, 4)))


def test_the_deadline_includes_the_queue() -> None:
    sim = Simulation(max_num_seqs=1)
    sim.submit(submit("running", prompt(1, 4), max_tokens=50))
    sim.submit(submit("queued", prompt(2, 4), timeout_s=2.0))
    sim.step()
    assert sim.core.next_deadline() == 2.0
    sim.now = 1.9
    sim.expire()
    assert not sim.failed
    sim.now = 2.0
    sim.expire()
    assert sim.failed["queued"].code == StatusCode.DEADLINE_EXCEEDED.value[0]
    assert sim.core.next_deadline() is None
    sim.run()
    assert set(sim.completed) == {"running"}
    sim.assert_all_free()


def test_a_non_finite_row_fails_only_its_own_request() -> None:
    bad = plain_tokens(prompt(1, 9), seq_sampling(submit("bad", prompt(1, 9))), 5)
    sim = Simulation(target=FakeEngine(model=FakeModel(bad_prefix=tuple(bad[3:5]))))
    good = submit("good", prompt(2, 9))
    sim.submit(submit("bad", prompt(1, 9)))
    sim.submit(good)
    sim.run()
    assert sim.failed["bad"].code == StatusCode.INTERNAL.value[0]
    assert sim.failed["bad"].message == "non-finite logits at position 14"
    assert sim.core.status().non_finite_rows_total == 1
    assert sim.tokens["bad", 0] == bad
    sim.assert_plain(good)
    assert "good" in sim.completed
    sim.assert_all_free()
    sim.submit(submit("again", prompt(1, 9), max_tokens=1))
    sim.run()
    assert sim.completed["again"].usage.cached_prompt_tokens == 0, "what it computed is not trusted"


def test_non_finite_drafts_only_cost_speed() -> None:
    message = submit("r", prompt(1, 9), max_tokens=20)
    tokens = plain_tokens(prompt(1, 9), seq_sampling(message), 20)
    sim = Simulation(draft=FakeEngine(role=DRAFT, model=FakeModel(bad_prefix=tuple(tokens[:2]))), k=1)
    sim.submit(message)
    sim.run()
    sim.assert_plain(message)
    assert len(sim.tokens["r", 0]) == 20
    sim.assert_all_free()


@pytest.mark.parametrize("speculate", [False, True])
def test_stop_strings_end_inside_a_round(speculate: bool) -> None:
    tokens = plain_tokens(prompt(1, 9), seq_sampling(submit("r", prompt(1, 9))), 16)
    stop = letters(tokens[5:8])
    sim = Simulation(draft=draft_engine(100) if speculate else None)
    sim.submit(submit("r", prompt(1, 9), stop=[stop]))
    sim.run()
    assert sim.tokens["r", 0] == tokens[:8]
    assert sim.text["r", 0] == letters(tokens[:5])
    finished = only_finish(sim, "r")
    assert (finished.reason, finished.stop_str) == (inference_pb2.FINISH_REASON_STOP, stop)
    assert sim.completed["r"].usage.completion_tokens == 8
    # Rounds bring 1, 5 and 5 tokens; the request ends before the last two accepted drafts of the third.
    assert sim.completed["r"].speculation.num_accepted_tokens == (6 if speculate else 0)
    sim.assert_all_free()


def test_eos_is_a_token_without_text_and_can_be_ignored() -> None:
    tokens = plain_tokens(prompt(1, 9), seq_sampling(submit("r", prompt(1, 9))), 16)
    eos = tokens[4]
    end = tokens.index(eos)
    sim = Simulation(eos_token_ids=frozenset([eos]))
    sim.submit(submit("stops", prompt(1, 9)))
    sim.submit(submit("goes on", prompt(1, 9), ignore_eos=True))
    sim.run()
    assert sim.tokens["stops", 0] == tokens[: end + 1]
    assert sim.text["stops", 0] == letters(tokens[:end])
    assert only_finish(sim, "stops").stop_token_id == eos
    assert sim.tokens["goes on", 0] == tokens
    assert not only_finish(sim, "goes on").HasField("stop_token_id")


def test_logprobs_carry_text_and_cover_the_tokens() -> None:
    sim = Simulation(draft=draft_engine(60))
    sim.submit(submit("r", prompt(1, 9), logprobs=0))
    sim.run()
    entries = [entry for chunk in sim.chunks for entry in chunk.logprobs]
    assert [entry.chosen.token_id for entry in entries] == sim.tokens["r", 0]
    assert [entry.chosen.logprob for entry in entries] == [-(9 + i) for i in range(16)]
    assert "".join(entry.chosen.text for entry in entries) == sim.text["r", 0]


@pytest.mark.parametrize("num_blocks", [64, 20])
def test_prompt_logprobs_are_complete_despite_prefix_hits_and_preemption(num_blocks: int) -> None:
    sim = Simulation(target=FakeEngine(num_blocks=num_blocks, max_model_len=64), max_num_batched_tokens=16)
    for i in range(3):
        sim.submit(submit(f"r{i}", prompt(1, 30), max_tokens=20, prompt_logprobs=0, n=2))
    sim.run()
    for i in range(3):
        first, *others = sim.completed[f"r{i}"].prompt_logprobs
        assert not first.HasField("chosen")
        assert [entry.chosen.token_id for entry in others] == prompt(1, 30)[1:]
        assert [entry.chosen.logprob for entry in others] == [-p for p in range(1, 30)]
        sim.assert_plain(submit(f"r{i}", prompt(1, 30)))


def test_requests_wait_for_a_target_that_comes_back() -> None:
    sim = Simulation(draft=draft_engine(), keeps_requests=True)
    running, hurried = submit("running", prompt(1, 9), n=3), submit("hurried", prompt(2, 9), timeout_s=1.0)
    for message in (running, hurried):
        sim.submit(message)
    while not sim.tokens.get(("running", 1)):
        sim.step()
    sim.lose_target()
    late, unwanted = submit("late", prompt(3, 9)), submit("unwanted", prompt(4, 9))
    for message in (late, unwanted):
        sim.submit(message)
    assert not sim.failed
    sim.now = 2.0
    sim.expire()
    assert sim.failed["hurried"].code == StatusCode.DEADLINE_EXCEEDED.value[0], "deadlines hold meanwhile"
    sim.cancel("unwanted")
    assert only_finish(sim, "unwanted").reason == inference_pb2.FINISH_REASON_ABORT
    sim.return_target()
    sim.run()
    for message in (running, late):
        assert len(sim.tokens[message.request_id, 0]) == 16
        for index in range(message.sampling.n):
            sim.assert_plain(message, index)
    assert list(sim.failed) == ["hurried"]
    sim.assert_all_free()


def test_a_prompt_that_is_computed_after_all_does_not_count_as_cached() -> None:
    """Its KV was in the cache of a target that was lost later."""
    sim = Simulation(keeps_requests=True)
    for request_id in ("first", "again"):
        sim.submit(submit(request_id, prompt(1, 24), n=2, max_tokens=9))
        while len(sim.tokens.get((request_id, 0), ())) < 3:
            sim.step()
        if request_id == "again":
            sim.lose_target()
            sim.return_target()
        sim.run()
    assert sim.completed["again"].usage.cached_prompt_tokens == 0


def test_a_target_that_comes_back_smaller_fails_only_what_it_cannot_hold() -> None:
    sim = Simulation(target=FakeEngine(num_blocks=16, max_model_len=64), keeps_requests=True)
    sim.submit(submit("long", prompt(1, 30), max_tokens=30))
    sim.submit(submit("short", prompt(2, 9), max_tokens=9))
    sim.step()
    sim.lose_target()
    sim.target.num_blocks = 8
    sim.return_target()
    sim.run()
    assert sim.failed["long"].message.startswith("the target was started again and has room for 32 tokens")
    sim.assert_plain(submit("short", prompt(2, 9)))
    assert len(sim.tokens["short", 0]) == 9


def break_target(sim: Simulation, poison: str) -> None:
    """Run until the target computes this request, which ends it; then it comes back."""
    seed = sim.submitted[poison].sampling.seed
    while True:
        sim.plan()
        if not sim.target_rounds:
            return
        message = sim.target_rounds[0]
        for init in message.init_seqs:
            if init.sampling.seed == seed:
                sim.lose_target()
                sim.return_target()
                return
        sim.run_target_round()


def test_a_request_that_ends_the_target_each_time_fails_and_no_other() -> None:
    sim = Simulation(keeps_requests=True)
    for number, name in enumerate(("a", "poison", "b", "c")):
        sim.submit(submit(name, prompt(number, 9), seed=number, max_tokens=5))
    while sim.core.num_requests:
        break_target(sim, "poison")
        sim.now += 1.0
        if "poison" in sim.failed:
            break
    sim.run()
    assert list(sim.failed) == ["poison"]
    assert sim.failed["poison"].code == StatusCode.INTERNAL.value[0]
    assert "request 'poison' was being computed each of the 3 times that the target was lost within 60 s" in (
        sim.failed["poison"].message
    )
    for number, name in enumerate(("a", "poison", "b", "c")):
        if name != "poison":
            sim.assert_plain(submit(name, prompt(number, 9), seed=number))
            assert len(sim.tokens[name, 0]) == 5
    sim.assert_all_free()


@pytest.mark.parametrize("pause_s", [1.0, 31.0])
def test_a_request_that_commits_or_takes_its_time_is_not_to_blame(pause_s: float) -> None:
    sim = Simulation(keeps_requests=True)
    sim.submit(submit("r", prompt(1, 9), max_tokens=16))
    while not (sim.completed or sim.failed):
        if pause_s < 30.0:  # otherwise it dies before it commits, but rarely
            for _ in range(4):
                sim.step()
        sim.plan()
        if len(sim.tokens.get(("r", 0), [])) > 12 or sim.now > 200.0:
            sim.run()
        else:
            sim.lose_target()
            sim.return_target()
            sim.now += pause_s
    assert not sim.failed
    sim.assert_plain(submit("r", prompt(1, 9)))


def test_no_request_is_to_blame_when_another_scheduler_takes_the_target_over() -> None:
    sim = Simulation(keeps_requests=True)
    sim.submit(submit("r", prompt(1, 9), max_tokens=5))
    for _ in range(4):
        sim.plan()
        sim.lose_target(has_died=False)
        sim.return_target()
    sim.run()
    assert not sim.failed
    sim.assert_plain(submit("r", prompt(1, 9)))


def test_a_seq_with_which_the_draft_died_three_times_goes_on_without_it() -> None:
    sim = Simulation(draft=draft_engine(100))
    sim.submit(submit("r", prompt(1, 9), max_tokens=30))
    num_drafts = []
    for _ in range(3):
        while not sim.draft_rounds:
            sim.plan()
            if not sim.draft_rounds:
                sim.run_target_round()
        num_drafts.append(len(sim.draft_rounds))
        sim.reconnect_draft()
    sim.run()
    assert all(num_drafts)
    sim.assert_plain(submit("r", prompt(1, 9)))
    assert sim.completed["r"].speculation.num_draft_tokens == 0


def test_requests_on_a_target_that_is_given_up_fail() -> None:
    sim = Simulation(keeps_requests=True)
    sim.submit(submit("r", prompt(1, 9)))
    sim.step()
    sim.lose_target()
    sim.core.give_up_target("target group: it is not started again")
    sim.submit(submit("late", prompt(1, 9)))
    sim.take(sim.core.take_outputs())
    assert {failed.code for failed in sim.failed.values()} == {StatusCode.UNAVAILABLE.value[0]}
    assert set(sim.failed) == {"r", "late"}


@pytest.mark.parametrize("num_before", [0, 1, 5, 11])
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_goes_on_at_another_scheduler(n: int, num_before: int) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "n": n, "logprobs": 1, "prompt_logprobs": 0}
    first_tokens = plain_tokens(prompt(1, 9), seq_sampling(submit("r", [1])), 9)
    message = submit("r", prompt(1, 9), stop=[letters(first_tokens[7:9])], **options)
    undisturbed, sim = Simulation(), Simulation(draft=draft_engine())
    for each in (undisturbed, sim):
        each.submit(message)
    undisturbed.run()
    while len(sim.tokens.get(("r", 0), [])) < min(num_before, len(undisturbed.tokens["r", 0])):
        sim.step()
    sim.now = 5.0
    sim.lose_scheduler()
    sim.run()
    assert sim.tokens == undisturbed.tokens
    assert sim.text == undisturbed.text, "held back text too comes once"
    ours, theirs = sim.completed["r"], undisturbed.completed["r"]
    assert ours.finished == theirs.finished
    assert ours.prompt_logprobs == theirs.prompt_logprobs
    assert ours.usage.completion_tokens == theirs.usage.completion_tokens
    sim.assert_all_free()


def test_timings_of_a_resumed_request_count_from_its_arrival() -> None:
    sim = Simulation()
    sim.now = 100.0
    message = submit("r", prompt(1, 9), max_tokens=3)
    samples = [inference_pb2.ResumedSample(token_ids=plain_tokens(prompt(1, 9), seq_sampling(message), 1))]
    message.resume_from.CopyFrom(inference_pb2.Resume(samples=samples, elapsed_s=10.0, first_token_s=2.0))
    assert sim.core.add(message, sim.now) is None
    sim.tokens["r", 0] = list(samples[0].token_ids)
    sim.now = 101.0
    sim.run()
    timings = sim.completed["r"].timings
    assert (timings.first_token_s, timings.total_s) == (2.0, 11.0)
    assert timings.queue_s <= timings.first_token_s


@pytest.mark.parametrize(
    ("token_ids", "problem"),
    [
        ([[1]], "resume_from.samples must be as many as n, 2, got 1"),
        ([[1], [40]], r"resume_from.samples\[1\].token_ids: token id 40 is outside"),
        ([[1, 2, 3], [1]], r"resume_from.samples\[0\].token_ids: the sample ends with token 2, but has 3"),
    ],
)
def test_what_no_scheduler_has_sent_cannot_be_resumed(token_ids: list[list[int]], problem: str) -> None:
    message = submit("r", prompt(1, 9), max_tokens=2, n=2)
    message.resume_from.samples.extend(inference_pb2.ResumedSample(token_ids=ids) for ids in token_ids)
    sim = Simulation()
    sim.submit(message)
    assert re.search(problem, sim.failed["r"].message)
    assert sim.core.num_requests == 0


def test_losing_the_target_fails_running_requests_with_the_reason() -> None:
    sim = Simulation(draft=draft_engine())
    sim.submit(submit("r", prompt(1, 9)))
    sim.step()
    sim.disconnect_target("target group: it died")
    assert sim.failed["r"].code == StatusCode.UNAVAILABLE.value[0]
    assert sim.failed["r"].message == "target group: it died"
    sim.submit(submit("late", prompt(1, 9)))
    assert sim.failed["late"].code == StatusCode.UNAVAILABLE.value[0]


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 99},
        {"token_ids": [1, 2]},
        {"token_ids": [40]},
        {"num_accepted_tokens": 1},
        {"confidences": [0.5, 0.5]},
    ],
)
def test_an_impossible_answer_is_refused(change: dict[str, Any]) -> None:
    sim = Simulation()
    sim.submit(submit("r", prompt(1, 9)))
    sim.plan()
    result = sim.target.run(sim.target_rounds.popleft())
    for field in change:
        result.rows[0].ClearField(field)
    result.rows[0].MergeFrom(worker_pb2.RowResult(**change))
    with pytest.raises(UnexpectedAnswerError, match="round 1: the answer for slot"):
        sim.core.on_target_result(result, sim.now)


def test_timings_follow_the_clock() -> None:
    sim = Simulation()
    sim.now = 10.0
    sim.submit(submit("r", prompt(1, 9), max_tokens=2))
    sim.now = 11.0
    sim.plan()
    sim.now = 13.0
    sim.run_target_round()
    sim.now = 17.0
    sim.run()
    timings = sim.completed["r"].timings
    assert (timings.queue_s, timings.first_token_s, timings.total_s) == (1.0, 3.0, 7.0)
