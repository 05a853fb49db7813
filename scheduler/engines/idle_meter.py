"""How long an engine had nothing to do although somebody could have used it."""


class IdleMeter:
    """Told of every change, it adds up the time in which the engine was idle and wanted. Seconds of one clock."""

    def __init__(self) -> None:
        self.idle_s = 0.0
        self._idle_since: float | None = None

    def update(self, now: float, *, is_idle: bool) -> None:
        """From `now` on the engine is idle and wanted, or is not."""
        if self._idle_since is not None:
            self.idle_s += now - self._idle_since
        self._idle_since = now if is_idle else None
