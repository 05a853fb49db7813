"""What happens to the replicas, as far as their statuses show it: the last events, for people."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from echelon.pb.control_pb2 import ReplicaEvent
from echelon.pb.scheduler_pb2 import SchedulerStatus, TierStatus
from echelon.pb.worker_pb2 import EngineRole

_MOST_EVENTS = 200
_REPEAT_S = 10.0  # things that happen often are told once in this time


class EventLog:
    """The last events of all replicas, oldest first. `clock`: seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events: deque[ReplicaEvent] = deque(maxlen=_MOST_EVENTS)
        self._num_events = 0

    def __iter__(self) -> Iterator[ReplicaEvent]:
        return iter(self._events)

    def info(self, replica: int, text: str) -> None:
        self._add(replica, ReplicaEvent.INFO, text)

    def warning(self, replica: int, text: str) -> None:
        self._add(replica, ReplicaEvent.WARNING, text)

    def error(self, replica: int, text: str) -> None:
        self._add(replica, ReplicaEvent.ERROR, text)

    def _add(self, replica: int, severity: ReplicaEvent.Severity.ValueType, text: str) -> None:
        self._num_events += 1
        event = ReplicaEvent(
            number=self._num_events, time_s=self._clock(), replica=replica, severity=severity, text=text
        )
        self._events.append(event)


class StatusWatch:
    """Compares each status of one replica with the one before it. `clock`: monotonic seconds."""

    def __init__(self, log: EventLog, replica: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._replica = replica
        self._clock = clock
        self._before: SchedulerStatus | None = None
        self._trouble: str | None = None  # why it is not ready; empty: it is; None: nothing is known
        self._told: dict[str, tuple[float, int]] = {}  # of each counter: when it was told, and its value then

    def on_status(self, status: SchedulerStatus) -> None:
        self._judge("" if status.ready else status.not_ready_reason or "not ready")
        before = self._before or SchedulerStatus()
        self._compare_drafts(before, status)
        self._compare_tiers(before, status)
        self._count("num_preemptions_total", status, "sequences were preempted for lack of KV blocks", self._log.info)
        self._count("non_finite_rows_total", status, "requests ended with NaN or infinite logits", self._log.error)
        self._before = status

    def on_unreachable(self, error: str) -> None:
        self._judge(f"its scheduler does not answer: {error}")

    def _judge(self, trouble: str) -> None:
        if bool(trouble) == bool(self._trouble) and self._trouble is not None:
            return
        if trouble:
            self._log.error(self._replica, f"not ready: {trouble}")
        else:
            self._log.info(self._replica, "ready" if self._trouble is None else "ready again")
        self._trouble = trouble

    def _compare_drafts(self, before: SchedulerStatus, status: SchedulerStatus) -> None:
        if status.draft_lost and not before.draft_lost:
            reason = f"its draft is lost, requests go on without drafts: {status.draft_not_ready_reason}"
            self._log.warning(self._replica, reason)
        elif before.draft_lost and not status.draft_lost:
            self._log.info(self._replica, "its draft is back")

    def _compare_tiers(self, before: SchedulerStatus, status: SchedulerStatus) -> None:
        was_paused = {_name(tier): tier.paused for tier in before.tiers}
        for tier in status.tiers:
            name = _name(tier)
            if tier.paused and not was_paused.get(name):
                self._log.warning(self._replica, f"KV on {name} is left alone after errors: {tier.last_error}")
            elif was_paused.get(name) and not tier.paused:
                self._log.info(self._replica, f"KV on {name} is used again")

    def _count(self, counter: str, status: SchedulerStatus, what: str, tell: Callable[[int, str], None]) -> None:
        """Tells that a counter has grown. One that has shrunk is that of a scheduler that was started again."""
        value: int = getattr(status, counter)
        told_s, told = self._told.setdefault(counter, (-_REPEAT_S, 0 if self._before else value))
        if value < told:
            self._told[counter] = told_s, value
        elif value > told and self._clock() - told_s >= _REPEAT_S:
            tell(self._replica, f"{value - told} {what}")
            self._told[counter] = self._clock(), value


def _name(tier: TierStatus) -> str:
    engine = EngineRole.Name(tier.engine).removeprefix("ENGINE_ROLE_").lower()
    return f"the {tier.tier} tier of the {engine}"
