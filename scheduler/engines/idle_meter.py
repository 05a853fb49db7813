"""How long an engine had nothing to do although work was waiting for it."""

from typing import Any

from echelon.pb import scheduler_pb2
from scheduler.engines.engine import EngineView


class IdleMeter:
    """Adds up the time in which the engine was idle and wanted. Tell it every change. Seconds of one clock."""

    def __init__(self) -> None:
        self.idle_s = 0.0
        self._idle_since: float | None = None

    def update(self, now: float, *, is_idle: bool) -> None:
        """Set whether the engine is idle and wanted from `now` on."""
        if self._idle_since is not None:
            self.idle_s += now - self._idle_since
        self._idle_since = now if is_idle else None


class Idleness:
    """Of target and draft."""

    def __init__(self) -> None:
        self._draft_idle = IdleMeter()
        self._verify_wait = IdleMeter()

    def update_target(self, now: float, engine: EngineView[Any] | None, *, is_wanted: bool) -> None:
        """`is_wanted`: drafts are waited for."""
        self._verify_wait.update(now, is_idle=is_wanted and engine is not None and not engine.in_flight)

    def update_draft(self, now: float, *, is_idle: bool) -> None:
        """`is_idle`: it has no round, though some seq should get drafts."""
        self._draft_idle.update(now, is_idle=is_idle)

    def report(self, status: scheduler_pb2.SchedulerStatus) -> None:
        status.draft_idle_seconds_total = self._draft_idle.idle_s
        status.verify_wait_seconds_total = self._verify_wait.idle_s
