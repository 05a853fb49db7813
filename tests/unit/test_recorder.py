"""What a recording contains, and when it ends."""

import asyncio
from typing import Any

import pytest

from echelon.pb import scheduler_pb2
from echelon.pb.worker_pb2 import (
    ENGINE_ROLE_DRAFT,
    ENGINE_ROLE_TARGET,
    MoveOrder,
    MoveResult,
    Round,
    RoundResult,
    Row,
    Span,
)
from scheduler.process.recorder import RecorderBusyError, Recording, RoundRecorder

TARGET, DRAFT = ENGINE_ROLE_TARGET, ENGINE_ROLE_DRAFT


class Bench:
    """A recorder with a clock and a status as the core would give it."""

    def __init__(self, *, is_colocated: bool = False) -> None:
        self.status = scheduler_pb2.SchedulerStatus(verify_wait_seconds_total=7.0)
        self.now_ns = 10_000
        self.recorder = RoundRecorder(lambda: self.status, is_colocated=is_colocated, now_ns=lambda: self.now_ns)

    def send(self, engine: Any, round_id: int, *, at_ns: int) -> Round:
        self.now_ns = 10_000 + at_ns
        message = Round(round_id=round_id, rows=[Row(), Row()])
        self.recorder.sent(engine, message)
        return message

    def answer(self, engine: Any, round_id: int, *, at_ns: int, **fields: Any) -> None:
        self.now_ns = 10_000 + at_ns
        self.recorder.received(engine, RoundResult(round_id=round_id, **fields))


async def all_of(recording: Recording) -> list[scheduler_pb2.TraceEvent]:
    async with asyncio.timeout(30):
        return [event async for event in recording]


async def test_rounds_ask_for_spans_while_somebody_records() -> None:
    bench = Bench()
    assert not bench.send(TARGET, 1, at_ns=0).trace
    recording = bench.recorder.start(max_rounds=1)
    assert bench.send(DRAFT, 5, at_ns=100).trace
    assert bench.send(TARGET, 2, at_ns=200).trace
    assert not bench.send(TARGET, 3, at_ns=300).trace
    assert not bench.send(DRAFT, 6, at_ns=300).trace
    bench.answer(TARGET, 1, at_ns=400)  # older than the recording
    span = Span(rank=1, name="verify", start_ns=3, run_ns=4)
    bench.answer(TARGET, 2, at_ns=500, queue_ns=20, run_ns=30, num_steps=1, spans=[span])
    assert not recording.is_over
    bench.answer(DRAFT, 5, at_ns=600)
    bench.answer(TARGET, 3, at_ns=700)
    target, draft = [event.round for event in await all_of(recording)]
    assert (target.engine, target.group, target.round_id) == (TARGET, "target", 2)
    assert (target.sent_ns, target.received_ns, target.queue_ns, target.run_ns) == (200, 500, 20, 30)
    assert (target.num_rows, target.num_steps, list(target.spans)) == (2, 1, [span])
    assert (draft.group, draft.sent_ns, draft.received_ns) == ("draft", 100, 600)


async def test_a_round_ends_the_wait_before_it() -> None:
    bench = Bench()
    recording = bench.recorder.start()
    bench.status.verify_wait_seconds_total += 50e-9
    bench.status.draft_idle_seconds_total += 1.0  # the wait began long before the recording
    bench.send(TARGET, 1, at_ns=80)
    bench.send(DRAFT, 1, at_ns=100)
    bench.send(TARGET, 2, at_ns=120)
    recording.close()
    for engine, round_id in ((TARGET, 1), (DRAFT, 1), (TARGET, 2)):
        bench.answer(engine, round_id, at_ns=200)
    waits = [event.wait for event in await all_of(recording) if event.HasField("wait")]
    assert [(wait.engine, wait.start_ns, wait.run_ns) for wait in waits] == [(TARGET, 30, 50), (DRAFT, 0, 100)]


async def test_a_colocated_draft_runs_in_the_targets_ranks() -> None:
    bench = Bench(is_colocated=True)
    recording = bench.recorder.start()
    bench.send(DRAFT, 1, at_ns=0)
    recording.close()
    bench.answer(DRAFT, 1, at_ns=1)
    (event,) = await all_of(recording)
    assert (event.round.engine, event.round.group) == (DRAFT, "target")


async def test_a_lost_group_ends_waits_for_it() -> None:
    bench = Bench()
    recording = bench.recorder.start()
    bench.send(TARGET, 1, at_ns=0)
    bench.send(DRAFT, 1, at_ns=0)
    recording.close()
    bench.recorder.lost(TARGET)
    bench.answer(DRAFT, 1, at_ns=1)
    assert [event.round.engine for event in await all_of(recording)] == [DRAFT]


def test_there_is_one_recording_at_a_time() -> None:
    bench = Bench()
    first = bench.recorder.start()
    with pytest.raises(RecorderBusyError, match="another recording runs"):
        bench.recorder.start()
    bench.recorder.stop(first)  # its reader has gone
    assert not bench.send(TARGET, 1, at_ns=0).trace
    second = bench.recorder.start()
    bench.recorder.stop(first)
    assert bench.send(TARGET, 2, at_ns=0).trace
    second.close()
    bench.answer(TARGET, 2, at_ns=1)
    bench.recorder.start()


async def test_rounds_can_be_watched_without_spans_by_several_at_once() -> None:
    bench = Bench()
    watchers = [bench.recorder.start(has_spans=False) for _ in range(2)]
    assert not bench.send(TARGET, 1, at_ns=100).trace, "nobody waits for a device"
    with_spans = bench.recorder.start()
    assert bench.send(TARGET, 2, at_ns=200).trace
    span = Span(rank=1, name="verify")
    for round_id in (1, 2):
        bench.answer(TARGET, round_id, at_ns=300, spans=[span])
    for recording in (*watchers, with_spans):
        recording.close()
    for watcher in watchers:
        rounds = [event.round for event in await all_of(watcher)]
        assert [(traced.round_id, traced.sent_ns, list(traced.spans)) for traced in rounds] == [
            (1, 100, []),
            (2, 200, []),
        ]
    (traced,) = [event.round for event in await all_of(with_spans)]
    assert (traced.round_id, list(traced.spans)) == (2, [span])


async def test_a_watcher_that_falls_behind_misses_events() -> None:
    bench = Bench()
    watcher = bench.recorder.start(has_spans=False)
    for round_id in range(5000):
        bench.send(TARGET, round_id, at_ns=0)
        bench.answer(TARGET, round_id, at_ns=1)
    watcher.close()
    assert 1000 < len(await all_of(watcher)) < 5000


def test_the_number_of_watchers_is_limited() -> None:
    bench = Bench()
    watchers = [bench.recorder.start(has_spans=False) for _ in range(16)]
    with pytest.raises(RecorderBusyError, match="16 clients watch rounds already"):
        bench.recorder.start(has_spans=False)
    bench.recorder.start()
    bench.recorder.stop(watchers[0])
    bench.recorder.start(has_spans=False)


async def test_moves_are_recorded_until_the_recording_ends() -> None:
    """It does not wait for them."""
    bench = Bench()
    recording = bench.recorder.start(max_rounds=1)
    for move_id in (1, 2, 3):
        order = MoveOrder(move_id=move_id, kind=MoveOrder.READ, host_slots=[4, 5], digests=[b"a", b"b"])
        bench.now_ns += 100
        bench.recorder.ordered(DRAFT if move_id == 3 else TARGET, order)
    bench.now_ns += 1000
    bench.recorder.moved(TARGET, MoveResult(move_id=1, failed=[1], rank_run_ns=[30, 40]))
    bench.recorder.moved(TARGET, MoveResult(move_id=9))  # older than the recording
    bench.recorder.lost(DRAFT)
    bench.recorder.moved(DRAFT, MoveResult(move_id=3))
    bench.send(TARGET, 1, at_ns=2000)
    bench.answer(TARGET, 1, at_ns=3000)
    bench.recorder.moved(TARGET, MoveResult(move_id=2))
    events = await all_of(recording)
    assert [event.WhichOneof("event") for event in events] == ["move", "round"]
    assert events[0].move == scheduler_pb2.TracedMove(
        engine=TARGET,
        group="target",
        kind=MoveOrder.READ,
        move_id=1,
        sent_ns=100,
        received_ns=1300,
        num_blocks=2,
        num_failed=1,
        rank_run_ns=[30, 40],
    )
