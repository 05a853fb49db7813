"""Recorded rounds and moves as a trace in the Chrome trace event format, which Perfetto and chrome://tracing show."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from echelon.pb import scheduler_pb2
from echelon.pb.worker_pb2 import ENGINE_ROLE_TARGET, EngineRole, MoveOrder, Span

JsonEvent = dict[str, Any]
T = TypeVar("T")

_SCHEDULER_PID = 1
_GROUP_PIDS = {"target": 2, "draft": 3}
_FIRST_MOVE_TID = 1000  # lanes of moves stand below those of rounds


def chrome_trace(events: Iterable[scheduler_pb2.TraceEvent]) -> dict[str, Any]:
    """A JSON document: a process for the scheduler and one for each worker group, a thread (a lane) for each rank.

    Spans of ranks are laid onto the scheduler's clock as `align` says. Times are microseconds from the beginning of
    the recording.
    """
    events = list(events)
    rounds = [event.round for event in events if event.HasField("round")]
    waits = [event.wait for event in events if event.HasField("wait")]
    moves = [event.move for event in events if event.HasField("move")]
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            *_scheduler_events(rounds, waits),
            *_group_events(rounds, {move.group for move in moves}),
            *_move_events(moves),
        ],
    }


def align(rounds: Sequence[scheduler_pb2.TracedRound]) -> list[int]:
    """When the leader began each of these rounds of one group, in ns on the scheduler's clock. In the order in which
    they came back, which is the order in which they ran.

    Clocks of two machines have nothing in common, but a duration is the same on both. So a round that was sent at s,
    waited for q, ran for r and was back at b began in [s + q, b - r]. The middle is right if both ways took as long.
    It is ignored if it would let rounds of the group overlap, which they never do.
    """
    latest = [traced.received_ns - traced.run_ns for traced in rounds]
    for i in reversed(range(len(rounds) - 1)):
        latest[i] = min(latest[i], latest[i + 1] - rounds[i].run_ns)
    began: list[int] = []
    end = 0
    for traced, last in zip(rounds, latest, strict=True):
        middle = (traced.sent_ns + traced.queue_ns + traced.received_ns - traced.run_ns) // 2
        began.append(max(traced.sent_ns, min(max(middle, end), last)))
        end = began[-1] + traced.run_ns
    return began


def _scheduler_events(
    rounds: Sequence[scheduler_pb2.TracedRound], waits: Sequence[scheduler_pb2.TracedWait]
) -> Iterator[JsonEvent]:
    """Rounds from their sending to their return, and how long engines waited in between. Rounds that were on their way
    at once are in lanes of their own."""
    yield from _process(_SCHEDULER_PID, "scheduler")
    tid = 0
    for engine in sorted({traced.engine for traced in rounds} | {wait.engine for wait in waits}):
        name = _name_of(engine)
        lanes = _without_overlap([traced for traced in rounds if traced.engine == engine], _round_trip)
        for number, lane in enumerate(lanes):
            yield _thread(_SCHEDULER_PID, tid + number, f"{name} rounds" + (f", {number + 1}" if number else ""))
            for traced in lane:
                run_ns = traced.received_ns - traced.sent_ns
                yield _complete(
                    f"{name} round", traced.sent_ns, run_ns, _SCHEDULER_PID, tid=tid + number, args=_args(traced)
                )
        for wait in waits:
            if wait.engine == engine:
                yield _complete("wait", wait.start_ns, wait.run_ns, _SCHEDULER_PID, tid=tid)
        tid += max(1, len(lanes))


def _without_overlap(events: Iterable[T], times: Callable[[T], tuple[int, int]]) -> list[list[T]]:
    """Lanes in which one event follows another. `times`: when it begins and ends."""
    lanes: list[list[T]] = []
    for event in sorted(events, key=times):
        free = next((lane for lane in lanes if times(lane[-1])[1] <= times(event)[0]), None)
        if free is None:
            lanes.append([event])
        else:
            free.append(event)
    return lanes


def _round_trip(traced: scheduler_pb2.TracedRound) -> tuple[int, int]:
    return traced.sent_ns, traced.received_ns


def _group_events(rounds: Sequence[scheduler_pb2.TracedRound], moving: set[str]) -> Iterator[JsonEvent]:
    """`moving`: groups that moved KV, even if they ran no round."""
    for group, pid in _GROUP_PIDS.items():
        of_group = sorted((r for r in rounds if r.group == group), key=lambda traced: traced.received_ns)
        if not of_group and group not in moving:
            continue
        yield from _process(pid, f"{group} group")
        for rank in sorted({span.rank for traced in of_group for span in traced.spans}):
            yield _thread(pid, rank, f"rank {rank}")
        for traced, began_ns in zip(of_group, align(of_group), strict=True):
            for span in traced.spans:
                yield _span(span, began_ns, pid, traced)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A move in one lane."""

    pid: int
    lane: str
    start_ns: int
    end_ns: int
    move: scheduler_pb2.TracedMove

    @property
    def times(self) -> tuple[int, int]:
        return self.start_ns, self.end_ns


def _move_events(moves: Iterable[scheduler_pb2.TracedMove]) -> Iterator[JsonEvent]:
    lanes: dict[tuple[int, str], list[_Piece]] = {}
    for piece in (piece for move in moves for piece in _pieces(move)):
        lanes.setdefault((piece.pid, piece.lane), []).append(piece)
    tid = _FIRST_MOVE_TID
    for (pid, name), pieces in sorted(lanes.items()):
        for number, lane in enumerate(_without_overlap(pieces, lambda piece: piece.times)):
            yield _thread(pid, tid, name + (f", {number + 1}" if number else ""))
            yield from (_move_event(piece, tid) for piece in lane)
            tid += 1


def _pieces(move: scheduler_pb2.TracedMove) -> Iterator[_Piece]:
    """For the scheduler from the order to its answer. For each rank what it did of that, up to the answer, because only
    durations are known."""
    name = f"{_name_of(move.engine)} {_kind_of(move)}s"
    yield _Piece(_SCHEDULER_PID, name, move.sent_ns, move.received_ns, move)
    for rank, run_ns in enumerate(move.rank_run_ns):
        start_ns = max(move.sent_ns, move.received_ns - run_ns)
        yield _Piece(_GROUP_PIDS[move.group], f"rank {rank}, {name}", start_ns, move.received_ns, move)


def _move_event(piece: _Piece, tid: int) -> JsonEvent:
    move = piece.move
    args = {"move": move.move_id, "blocks": move.num_blocks, "failed": move.num_failed}
    run_ns = piece.end_ns - piece.start_ns
    return _complete(_kind_of(move), piece.start_ns, run_ns, piece.pid, tid=tid, args=args)


def _kind_of(move: scheduler_pb2.TracedMove) -> str:
    return MoveOrder.Kind.Name(move.kind).lower()


def _span(span: Span, began_ns: int, pid: int, traced: scheduler_pb2.TracedRound) -> JsonEvent:
    args = {"engine": _name_of(traced.engine), "round": traced.round_id}
    return _complete(span.name, began_ns + span.start_ns, span.run_ns, pid, tid=span.rank, args=args)


def _args(traced: scheduler_pb2.TracedRound) -> dict[str, Any]:
    return {
        "round": traced.round_id,
        "rows": traced.num_rows,
        "steps": traced.num_steps,
        "queue_us": traced.queue_ns / 1e3,
        "run_us": traced.run_ns / 1e3,
    }


def _name_of(engine: EngineRole.ValueType) -> str:
    return "target" if engine == ENGINE_ROLE_TARGET else "draft"


def _complete(
    name: str, start_ns: int, run_ns: int, pid: int, *, tid: int, args: dict[str, Any] | None = None
) -> JsonEvent:
    times = {"ts": start_ns / 1e3, "dur": run_ns / 1e3}
    return {"name": name, "ph": "X", "cat": "echelon", **times, "pid": pid, "tid": tid, "args": args or {}}


def _process(pid: int, name: str) -> Iterator[JsonEvent]:
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}}


def _thread(pid: int, tid: int, name: str) -> JsonEvent:
    return {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
