"""Recorded rounds as a trace in the Chrome trace event format, which Perfetto and chrome://tracing show."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from echelon.pb import scheduler_pb2
from echelon.pb.worker_pb2 import ENGINE_ROLE_TARGET, EngineRole, Span

JsonEvent = dict[str, Any]

_SCHEDULER_PID = 1
_GROUP_PIDS = {"target": 2, "draft": 3}


def chrome_trace(events: Iterable[scheduler_pb2.TraceEvent]) -> dict[str, Any]:
    """A JSON document: a process for the scheduler and one for each worker group, a thread (a lane) for each rank.

    Spans of ranks are laid onto the scheduler's clock as `align` says. Times are microseconds from the beginning of
    the recording.
    """
    events = list(events)
    rounds = [event.round for event in events if event.HasField("round")]
    waits = [event.wait for event in events if event.HasField("wait")]
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [*_scheduler_events(rounds, waits), *_group_events(rounds)],
    }


def align(rounds: Sequence[scheduler_pb2.TracedRound]) -> list[int]:
    """When the leader began each of these rounds of one group, in ns on the scheduler's clock. In the order in which
    they came back, which is the order in which they ran.

    Clocks of two machines have nothing in common, but a duration is the same on both. So a round that was sent at s,
    waited for q, ran for r and was back at b began in [s + q, b - r]. The middle is right if both ways took as long.
    It gives way where it would let rounds of the group overlap, which they never do.
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
        lanes = _without_overlap([traced for traced in rounds if traced.engine == engine])
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


def _without_overlap(rounds: Sequence[scheduler_pb2.TracedRound]) -> list[list[scheduler_pb2.TracedRound]]:
    """Lanes in which one round follows another."""
    lanes: list[list[scheduler_pb2.TracedRound]] = []
    for traced in sorted(rounds, key=lambda traced: traced.sent_ns):
        free = next((lane for lane in lanes if lane[-1].received_ns <= traced.sent_ns), None)
        if free is None:
            lanes.append([traced])
        else:
            free.append(traced)
    return lanes


def _group_events(rounds: Sequence[scheduler_pb2.TracedRound]) -> Iterator[JsonEvent]:
    for group, pid in _GROUP_PIDS.items():
        of_group = sorted((r for r in rounds if r.group == group), key=lambda traced: traced.received_ns)
        if not of_group:
            continue
        yield from _process(pid, f"{group} group")
        for rank in sorted({span.rank for traced in of_group for span in traced.spans}):
            yield _thread(pid, rank, f"rank {rank}")
        for traced, began_ns in zip(of_group, align(of_group), strict=True):
            for span in traced.spans:
                yield _span(span, began_ns, pid, traced)


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
