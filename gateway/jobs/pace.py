"""How fast the items of a job end."""

from collections import deque

_NUM_RECENT = 128  # items


class Pace:
    """Of the last items, as far as this process has seen them end."""

    def __init__(self) -> None:
        self._ends_s: deque[float] = deque(maxlen=_NUM_RECENT)

    def note(self, now_s: float) -> None:
        """An item has ended; by a monotonic clock."""
        self._ends_s.append(now_s)

    def items_per_s(self, now_s: float) -> float | None:
        """None: too few have ended. Slower while none ends."""
        if len(self._ends_s) < 2:
            return None
        passed_s = now_s - self._ends_s[0]
        return (len(self._ends_s) - 1) / passed_s if passed_s > 0 else None
