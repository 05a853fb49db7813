"""How long an engine had nothing to do although work was waiting for it."""


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
