"""The job store for an event loop: calls run in one thread, and results that come at once are recorded at once."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from gateway.jobs.records import Result
from gateway.jobs.store import JobStore

P = ParamSpec("P")
T = TypeVar("T")


class StoreThread:
    """`record` needs `run`, which lasts until it is cancelled."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._finished: list[tuple[Result, asyncio.Future[None]]] = []
        self._has_finished = asyncio.Event()

    async def call(self, method: Callable[Concatenate[JobStore, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A method of JobStore, by its name in the class. Raises what it raises."""
        work = functools.partial(method, self._store, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def record(self, result: Result) -> None:
        """Returns once it survives whatever happens."""
        recorded = asyncio.get_running_loop().create_future()
        self._finished.append((result, recorded))
        self._has_finished.set()
        await recorded

    async def run(self) -> None:
        while True:
            await self._has_finished.wait()
            self._has_finished.clear()
            batch, self._finished = self._finished, []
            try:
                await self.call(JobStore.record, [result for result, _ in batch])
            except Exception as err:  # noqa: BLE001  # it is raised where the result came from
                _resolve(batch, err)
            else:
                _resolve(batch, None)

    async def close(self) -> None:
        await self.call(JobStore.close)
        self._thread.shutdown()


def _resolve(batch: list[tuple[Result, "asyncio.Future[None]"]], error: Exception | None) -> None:
    for _, recorded in batch:
        if recorded.done():
            continue  # nobody waits any more
        if error is None:
            recorded.set_result(None)
        else:
            recorded.set_exception(error)
