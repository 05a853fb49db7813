"""How long an event loop cannot run."""

import asyncio
import time


class PauseMeter:
    """`async with PauseMeter() as meter`: while the block runs, a timer of the loop records how late it is each
    time."""

    def __init__(self, interval_s: float = 0.002) -> None:
        self.pauses_s: list[float] = []
        self.busy_s: list[float] = []  # CPU time of its thread meanwhile: waiting for a core is not the loop's fault
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    @property
    def longest_s(self) -> float:
        return max(self.pauses_s, default=0.0)

    @property
    def busiest_s(self) -> float:
        return max(self.busy_s, default=0.0)

    async def __aenter__(self) -> "PauseMeter":
        self._task = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None, "the block has begun"
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _measure(self) -> None:
        while True:
            before, computed = time.perf_counter(), time.thread_time()
            await asyncio.sleep(self._interval_s)
            self.pauses_s.append(time.perf_counter() - before - self._interval_s)
            self.busy_s.append(time.thread_time() - computed)
