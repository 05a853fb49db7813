"""Which lost parts of a running deployment are started again, and when. Pure: times are seconds of one clock."""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import inf

from cluster.process_id import PartId

logger = logging.getLogger(__name__)

_MOST_EVENTS = 50  # that are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """None of these numbers is measured."""

    second_delay_s: float = 1.0  # the first start is at once; the second in a row waits so long ...
    most_delay_s: float = 30.0  # ... and each further one twice as long, up to this
    stable_s: float = 10.0  # a part that was up for so long may be started at once again
    settle_s: float = 10.0  # for the scheduler to reach a group that has just started
    most_failed_starts: int = 5  # in a row, after which a part is given up
    search_s: float = 3.0  # after which a place is looked for again where there was none


_TUNING = Tuning()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryEvent:
    """Something that happened to a part, or to the replicas."""

    at_s: float
    part: str  # as people know it
    text: str


class _Phase(Enum):
    UP = auto()
    LOST = auto()
    STARTING = auto()
    GIVEN_UP = auto()


@dataclass(slots=True, kw_only=True)
class _Part:
    phase: _Phase = _Phase.UP
    up_since_s: float
    lost_at_s: float = -inf
    due_s: float = inf
    num_in_row: int = 0  # starts since it was last up for `stable_s`
    num_failed: int = 0  # starts in a row that ended before it was ready
    no_place: str = ""  # why it cannot be started anywhere now


class Recovery:
    """What has become of each part: a worker group, the scheduler, the gateway. Not thread-safe."""

    def __init__(
        self,
        parts: Iterable[PartId],
        now: float,
        *,
        can_start: Iterable[PartId],
        needs: Mapping[PartId, Sequence[PartId]] | None = None,
        tuning: Tuning = _TUNING,
    ) -> None:
        """
        Args:
            parts: all of them run.
            can_start: those that can be started again; others are given up when they are lost.
            needs: parts that must be up before a part is started.
        """
        self._parts = {name: _Part(up_since_s=now) for name in parts}
        self._needs = dict(needs or {})
        self._can_start = set(can_start)
        self._tuning = tuning
        self._events: deque[RecoveryEvent] = deque(maxlen=_MOST_EVENTS)

    @property
    def events(self) -> tuple[RecoveryEvent, ...]:
        """Oldest first."""
        return tuple(self._events)

    def add(self, part: PartId, now: float, *, can_start: bool, needs: Sequence[PartId] = ()) -> None:
        """One more part, which runs."""
        self._parts[part] = _Part(up_since_s=now)
        self._needs[part] = needs
        if can_start:
            self._can_start.add(part)

    def remove(self, part: PartId) -> None:
        """It is being ended: its loss means nothing."""
        self._parts.pop(part, None)
        self._can_start.discard(part)

    def knows(self, part: PartId) -> bool:
        return part in self._parts

    def is_up(self, part: PartId) -> bool:
        return self._is_in(part, _Phase.UP)

    def is_given_up(self, part: PartId) -> bool:
        return self._is_in(part, _Phase.GIVEN_UP)

    def has_no_place(self, part: PartId) -> bool:
        """When it was last looked for."""
        return part in self._parts and bool(self._parts[part].no_place)

    def is_settled(self, part: PartId, now: float) -> bool:
        """Whether it has been up for so long that its silence means something."""
        return self.is_up(part) and now - self._parts[part].up_since_s >= self._tuning.settle_s

    def on_lost(self, part: PartId, reason: str, now: float) -> None:
        """A part that was up has died, or does not answer. Nothing if it is not up: it is known already."""
        if not self.is_up(part):
            return
        state = self._parts[part]
        self.note(part.name, f"lost: {reason}", now)
        state.lost_at_s = now
        if now - state.up_since_s >= self._tuning.stable_s:
            state.num_in_row = 0
        if part in self._can_start:
            self._wait(state, now)
        else:
            state.phase = _Phase.GIVEN_UP

    def take_due(self, now: float) -> list[PartId]:
        """The parts to start now; they count as starting."""
        due = [name for name, state in self._parts.items() if state.due_s <= now and self._may_start(name)]
        for name in due:
            state = self._parts[name]
            state.phase = _Phase.STARTING
            if not state.no_place:
                state.num_in_row += 1
                self.note(name.name, "is started again", now)
        return due

    def next_due(self) -> float:
        """When `take_due` is worth calling again if nothing else happens; inf: never."""
        return min((state.due_s for name, state in self._parts.items() if self._may_start(name)), default=inf)

    def on_up(self, part: PartId, now: float, *, num_spares: int = 0) -> None:
        """`num_spares`: how many of its processes were spares before."""
        if not self._is_in(part, _Phase.STARTING):
            return  # it was removed meanwhile
        state = self._parts[part]
        state.phase, state.up_since_s, state.num_failed, state.no_place = _Phase.UP, now, 0, ""
        by_spares = f", by {num_spares} spare{'s' if num_spares > 1 else ''}" if num_spares else ""
        self.note(part.name, f"is up again, {now - state.lost_at_s:.1f} s after it was lost{by_spares}", now)

    def on_failed_start(self, part: PartId, reason: str, now: float) -> None:
        if not self._is_in(part, _Phase.STARTING):
            return
        state = self._parts[part]
        state.num_failed += 1
        self.note(part.name, f"start failed: {reason}", now)
        if state.num_failed < self._tuning.most_failed_starts:
            self._wait(state, now)
        else:
            state.phase = _Phase.GIVEN_UP
            self.note(part.name, f"is given up: {state.num_failed} starts in a row failed", now)

    def on_no_place(self, part: PartId, reason: str, now: float) -> None:
        """There is nowhere to start it, until more machines are there or something ends. That is no failed start."""
        if not self._is_in(part, _Phase.STARTING):
            return
        state = self._parts[part]
        if state.no_place != reason:
            self.note(part.name, f"has no place: {reason}", now)
        state.phase, state.no_place, state.due_s = _Phase.LOST, reason, now + self._tuning.search_s

    def _is_in(self, part: PartId, phase: _Phase) -> bool:
        return part in self._parts and self._parts[part].phase is phase

    def _may_start(self, part: PartId) -> bool:
        needed = self._needs.get(part, ())
        return self._parts[part].phase is _Phase.LOST and all(self.is_up(other) for other in needed)

    def _wait(self, state: _Part, now: float) -> None:
        state.phase = _Phase.LOST
        delay_s = self._tuning.second_delay_s * 2 ** (state.num_in_row - 1) if state.num_in_row else 0.0
        state.due_s = now + min(delay_s, self._tuning.most_delay_s)

    def note(self, part: str, text: str, now: float) -> None:
        """Something happened to what people know by this name."""
        self._events.append(RecoveryEvent(at_s=now, part=part, text=text))
        logger.warning("%s: %s", part, text)
