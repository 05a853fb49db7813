"""Work that many clients cause at once, in turns with everything else that the event loop has to do."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

_TURN_S = 0.002  # how long others wait at most, besides for the last piece of work; not measured


class Turns:
    """Does work in the order in which it comes, for a few milliseconds in each pass of the running event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[Callable[[], None]] = deque()
        self._left_s = _TURN_S
        self._is_renewed = True  # the next pass begins a new turn

    def take(self, work: Callable[[], None]) -> bool:
        """Does the work at once and returns True, or in a later turn and returns False."""
        at_once = not self._waiting and self._left_s > 0
        if at_once:
            self._do(work)
        else:
            self._waiting.append(work)
        if self._is_renewed:
            self._is_renewed = False
            asyncio.get_running_loop().call_soon(self._begin)
        return at_once

    def _begin(self) -> None:
        self._left_s = _TURN_S
        while self._waiting and self._left_s > 0:
            self._do(self._waiting.popleft())
        self._is_renewed = not self._waiting
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._begin)

    def _do(self, work: Callable[[], None]) -> None:
        began_s = self._clock()
        work()
        self._left_s -= self._clock() - began_s
