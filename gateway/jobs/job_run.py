"""The life of one job: its lines become items, each is tried until it has a result, and then the job ends."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from gateway.jobs.folder import JobsFolder
from gateway.jobs.lines import not_run
from gateway.jobs.pace import Pace
from gateway.jobs.records import Item, Job, JobStatus, Result
from gateway.jobs.scan import BadInputError, scan
from gateway.jobs.store import JobStore
from gateway.jobs.store_thread import StoreThread
from gateway.jobs.worker import Worker
from gateway.requests.refusal import Refusal

logger = logging.getLogger(__name__)

_PAGE = 64  # items that are looked up, or given up, at once
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 5.0
_MOST_TRIES = 5  # of an item that fails for reasons of ours
# Reasons that pass: the item is tried again for as long as its job has time.
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_STUMBLED = Refusal(grpc.StatusCode.INTERNAL, "the gateway could not process the request; its log says why")


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What all jobs share."""

    folder: JobsFolder
    store: StoreThread
    worker: Worker
    slots: asyncio.Semaphore  # of items that run; whoever waits for the longest time is next, so jobs take turns
    max_line_bytes: int
    on_progress: Callable[[], None]
    on_result: Callable[[Result], None]  # once it is recorded
    now: Callable[[], float]  # the wall clock


class JobRun:
    """Of a job that has not ended. `run` once; whatever it was doing when its process was lost is done again."""

    def __init__(self, job: Job, means: Means) -> None:
        self.pace = Pace()
        self._job = job
        self._means = means
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """The store says that the job is to end."""
        self._stopping.set()

    async def run(self) -> None:
        if self._job.status in (JobStatus.VALIDATING, JobStatus.IN_PROGRESS):
            await self._work_in_time()
        store = self._means.store
        if not self._job.status.is_ended:
            await self._give_up_items()
            self._job = await store.call(JobStore.end, self._job.id)
        logger.info("job %s is %s", self._job.id, self._job.status)
        self._means.on_progress()

    async def _work_in_time(self) -> None:
        """Until there is nothing left to do, somebody stops the job, or its time is over."""
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stopping.wait())
        remaining_s = max(0.0, self._job.expires_at - self._means.now())
        try:
            done, _ = await asyncio.wait((working, stopping), timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
            if working in done:
                working.result()
                return
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)
        self._job = await self._means.store.call(JobStore.stop, self._job.id, JobStatus.FINALIZING)

    async def _work(self) -> None:
        store = self._means.store
        if self._job.status is JobStatus.VALIDATING:
            try:
                await self._find_items()
            except BadInputError as err:
                self._job = await store.call(JobStore.fail, self._job.id, err.problems)
                return
            self._job = await store.call(JobStore.start, self._job.id)
            self._means.on_progress()
        async with asyncio.TaskGroup() as running:
            async for item in self._items_left():
                await self._means.slots.acquire()
                task = running.create_task(self._run_item(item))
                task.add_done_callback(lambda _: self._means.slots.release())  # even if it never begins

    async def _find_items(self) -> None:
        """Raises BadInputError."""
        means, backoff_s = self._means, _MIN_BACKOFF_S
        while True:
            try:
                self._job = await scan(
                    self._job, means.folder, means.store, means.worker, max_line_bytes=means.max_line_bytes
                )
            except Refusal as refusal:
                logger.warning("the lines of job %s cannot be read yet: %s", self._job.id, refusal)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                job = await means.store.call(JobStore.job, self._job.id, None)
                assert job is not None, "a job that has not ended is not deleted"
                self._job = job
            else:
                return

    async def _items_left(self) -> AsyncIterator[Item]:
        last = -1
        while page := await self._means.store.call(JobStore.items_left, self._job.id, last, _PAGE):
            for item in page:
                yield item
            last = page[-1].number

    async def _run_item(self, item: Item) -> None:
        means = self._means
        line = await asyncio.to_thread(means.folder.read, self._job.order.input_file, item.start, item.num_bytes)
        result = await self._result(item, line)
        await means.store.record(result)
        means.on_result(result)
        self.pace.note(time.monotonic())
        means.on_progress()

    async def _result(self, item: Item, line: bytes) -> Result:
        backoff_s, num_tries = _MIN_BACKOFF_S, 0
        while True:
            try:
                return await self._means.worker.run(self._job, item, line)
            except Refusal as err:
                refusal = err
            except Exception:  # the other items of the job go on
                logger.exception("item %d of job %s stumbled", item.number, self._job.id)
                refusal = _STUMBLED
            num_tries += refusal.code not in _PASSING
            if num_tries == _MOST_TRIES:
                return self._means.worker.failed(self._job, item, refusal)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _give_up_items(self) -> None:
        """Those that a job which stops has left."""
        store = self._means.store
        while items := await store.call(JobStore.items_left, self._job.id, -1, _PAGE):
            results = [not_run(self._job, item) for item in items]
            await store.call(JobStore.record, results)
            for result in results:
                self._means.on_result(result)
