"""Which requests run out of time next."""

from heapq import heapify, heappop, heappush

from scheduler.requests.request import Request

_FEW = 64  # requests that may stay, finished or not


class Deadlines:
    """A heap. Finished requests stay in it until they surface, or are more than half of it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._num_added = 0  # breaks ties
        self._most = _FEW  # requests before the finished ones are removed

    def add(self, request: Request) -> None:
        if request.deadline_s is None:
            return
        self._num_added += 1
        heappush(self._heap, (request.deadline_s, self._num_added, request))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if not entry[2].is_finished]
            heapify(self._heap)
            self._most = max(_FEW, 2 * len(self._heap))

    def next(self) -> float | None:
        """When the next request expires."""
        while self._heap and self._heap[0][2].is_finished:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_expired(self, now: float) -> list[Request]:
        """The requests whose time is over."""
        expired = []
        while (deadline_s := self.next()) is not None and deadline_s <= now:
            expired.append(heappop(self._heap)[2])
        return expired
