"""Records what engines do for a while: every round and every move of KV, as it left and as it returned."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from echelon.pb import scheduler_pb2, worker_pb2
from echelon.pb.worker_pb2 import ENGINE_ROLE_TARGET, EngineRole

ReadStatus = Callable[[], scheduler_pb2.SchedulerStatus]


_MOST_WATCHERS = 16  # recordings without spans at once
_MOST_UNREAD = 4096  # events of such a recording that wait for their reader; later ones are dropped


class RecorderBusyError(RuntimeError):
    """No further recording may run now."""


class RoundRecorder:
    """Sees every round of a replica; without recordings it does nothing. A recording with spans asks the round's ranks
    for them (`Round.trace`), so there is one at a time."""

    def __init__(
        self, read_status: ReadStatus, *, is_colocated: bool, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._read_status = read_status
        self._is_colocated = is_colocated
        self._now_ns = now_ns
        self._recordings: list[Recording] = []

    def start(self, *, max_rounds: int = 0, has_spans: bool = True) -> "Recording":
        """Record until `max_rounds` rounds of the target were sent (0: no limit) or the caller ends it. Raises
        RecorderBusyError."""
        running = [other for other in self._recordings if other.has_spans == has_spans and not other.is_over]
        if has_spans and running:
            raise RecorderBusyError("another recording runs; try again when it has ended")
        if len(running) >= _MOST_WATCHERS:
            raise RecorderBusyError(f"{_MOST_WATCHERS} clients watch rounds already; try again when one has left")
        recording = Recording(
            self._read_status,
            is_colocated=self._is_colocated,
            max_rounds=max_rounds,
            has_spans=has_spans,
            now_ns=self._now_ns,
        )
        self._recordings.append(recording)
        return recording

    def stop(self, recording: "Recording") -> None:
        """The recording is not read any longer."""
        self._recordings = [other for other in self._recordings if other is not recording]

    def sent(self, engine: EngineRole.ValueType, message: worker_pb2.Round) -> None:
        """The round is about to be sent."""
        for recording in self._recordings:
            recording.sent(engine, message)

    def received(self, engine: EngineRole.ValueType, result: worker_pb2.RoundResult) -> None:
        for recording in self._recordings:
            recording.received(engine, result)

    def ordered(self, engine: EngineRole.ValueType, order: worker_pb2.MoveOrder) -> None:
        """The move is about to be sent."""
        for recording in self._recordings:
            recording.ordered(engine, order)

    def moved(self, engine: EngineRole.ValueType, result: worker_pb2.MoveResult) -> None:
        for recording in self._recordings:
            recording.moved(engine, result)

    def lost(self, engine: EngineRole.ValueType) -> None:
        """The engine's rounds and moves will not come back."""
        for recording in self._recordings:
            recording.lost(engine)


@dataclass(frozen=True, slots=True)
class _Sent:
    at_ns: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class _Ordered:
    at_ns: int
    order: worker_pb2.MoveOrder


class Recording:
    """The events of one recording, in the order in which they ended. Iterate over them once, on one event loop."""

    def __init__(
        self,
        read_status: ReadStatus,
        *,
        is_colocated: bool,
        max_rounds: int,
        has_spans: bool,
        now_ns: Callable[[], int],
    ) -> None:
        self.has_spans = has_spans
        self._read_status = read_status
        self._is_colocated = is_colocated
        self._max_rounds = max_rounds
        self._now_ns = now_ns
        self._began_ns = now_ns()
        self._num_rounds = 0
        self._in_flight: dict[tuple[EngineRole.ValueType, int], _Sent] = {}
        self._moves: dict[tuple[EngineRole.ValueType, int], _Ordered] = {}  # the end does not wait for them
        self._is_open = True
        self._events: asyncio.Queue[scheduler_pb2.TraceEvent | None] = asyncio.Queue()
        status = read_status()
        self._idle_s = {engine: _idle_s(status, engine) for engine in EngineRole.values()}

    @property
    def is_over(self) -> bool:
        """No more events will come."""
        return not self._is_open and not self._in_flight

    def close(self) -> None:
        """Record no more rounds; wait for those in flight."""
        if self._is_open:
            self._is_open = False
            self._end_if_over()

    async def __aiter__(self) -> AsyncIterator[scheduler_pb2.TraceEvent]:
        while (event := await self._events.get()) is not None:
            yield event

    def sent(self, engine: EngineRole.ValueType, message: worker_pb2.Round) -> None:
        if not self._is_open:
            return
        now_ns = self._since_begin_ns()
        self._note_wait(engine, now_ns)
        message.trace = message.trace or self.has_spans
        self._in_flight[engine, message.round_id] = _Sent(now_ns, len(message.rows))
        self._num_rounds += engine == ENGINE_ROLE_TARGET
        if self._max_rounds and self._num_rounds >= self._max_rounds:
            self.close()

    def received(self, engine: EngineRole.ValueType, result: worker_pb2.RoundResult) -> None:
        sent = self._in_flight.pop((engine, result.round_id), None)
        if sent is None:
            return  # sent before the recording began, or after it was closed
        traced = scheduler_pb2.TracedRound(
            engine=engine,
            group=self._group_of(engine),
            round_id=result.round_id,
            sent_ns=sent.at_ns,
            received_ns=self._since_begin_ns(),
            queue_ns=result.queue_ns,
            run_ns=result.run_ns,
            num_rows=sent.num_rows,
            num_steps=result.num_steps,
            spans=result.spans if self.has_spans else (),
        )
        self._note(scheduler_pb2.TraceEvent(round=traced))
        self._end_if_over()

    def ordered(self, engine: EngineRole.ValueType, order: worker_pb2.MoveOrder) -> None:
        if self._is_open:
            self._moves[engine, order.move_id] = _Ordered(self._since_begin_ns(), order)

    def moved(self, engine: EngineRole.ValueType, result: worker_pb2.MoveResult) -> None:
        ordered = self._moves.pop((engine, result.move_id), None)
        if ordered is None or self.is_over:
            return
        traced = scheduler_pb2.TracedMove(
            engine=engine,
            group=self._group_of(engine),
            kind=ordered.order.kind,
            move_id=result.move_id,
            sent_ns=ordered.at_ns,
            received_ns=self._since_begin_ns(),
            num_blocks=max(len(ordered.order.host_slots), len(ordered.order.digests)),
            num_failed=len(result.failed),
            rank_run_ns=result.rank_run_ns,
        )
        self._note(scheduler_pb2.TraceEvent(move=traced))

    def lost(self, engine: EngineRole.ValueType) -> None:
        if self.is_over:
            return
        self._moves = {key: ordered for key, ordered in self._moves.items() if key[0] != engine}
        self._in_flight = {key: sent for key, sent in self._in_flight.items() if key[0] != engine}
        self._end_if_over()

    def _note_wait(self, engine: EngineRole.ValueType, now_ns: int) -> None:
        """The engine's idle time, though wanted, since its last round. This round ended it."""
        idle_s = _idle_s(self._read_status(), engine)
        grown_ns = round((idle_s - self._idle_s[engine]) * 1e9)
        self._idle_s[engine] = idle_s
        if grown_ns > 0:
            start_ns = max(0, now_ns - grown_ns)  # it may have begun before the recording
            wait = scheduler_pb2.TracedWait(engine=engine, start_ns=start_ns, run_ns=now_ns - start_ns)
            self._note(scheduler_pb2.TraceEvent(wait=wait))

    def _group_of(self, engine: EngineRole.ValueType) -> str:
        return "target" if engine == ENGINE_ROLE_TARGET or self._is_colocated else "draft"

    def _since_begin_ns(self) -> int:
        return self._now_ns() - self._began_ns

    def _note(self, event: scheduler_pb2.TraceEvent) -> None:
        if self.has_spans or self._events.qsize() < _MOST_UNREAD:
            self._events.put_nowait(event)

    def _end_if_over(self) -> None:
        if self.is_over:
            self._events.put_nowait(None)


def _idle_s(status: scheduler_pb2.SchedulerStatus, engine: EngineRole.ValueType) -> float:
    if engine == ENGINE_ROLE_TARGET:
        return status.verify_wait_seconds_total
    return status.draft_idle_seconds_total
