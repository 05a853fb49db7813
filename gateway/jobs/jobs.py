"""The jobs of a deployment, as the doors see them. One process owns them; the lock of their folder says which."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from gateway.jobs.checks import check_file_name
from gateway.jobs.errors import KeyTakenError, NoInputError
from gateway.jobs.folder import JobsFolder
from gateway.jobs.job_run import JobRun, Means
from gateway.jobs.records import FileRecord, Job, JobOrder, JobStatus, Result
from gateway.jobs.store import JobStore, Page
from gateway.jobs.store_thread import StoreThread
from gateway.jobs.worker import Worker
from gateway.requests.refusal import Refusal, shown

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_TAKE_AGAIN_S = 1.0
_RUN_AGAIN_S = 5.0  # a job that failed for an unexpected reason
_SWEEP_S = 600.0
_PIECE_BYTES = 1 << 20  # of a file, that are read at once; and characters of results


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of all jobs of a deployment."""

    max_running: int  # items at once
    max_line_bytes: int
    max_bytes: int  # of all uploads
    retention_s: float  # for which jobs that have ended, and files that no job reads, are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job, and how fast it goes: None where that is not known."""

    job: Job
    items_per_s: float | None = None

    @property
    def eta_s(self) -> float | None:
        return self.job.num_left / self.items_per_s if self.items_per_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNumbers:
    """Of all jobs together."""

    by_status: Mapping[str, int]
    num_left: int  # items without a result
    oldest_age_s: float  # of the jobs that have not ended; 0: all have
    num_completed: int  # items, in the life of this process
    num_failed: int  # the same; their results are errors


class Jobs:
    """`open` once, then `close`, both in the event loop that uses it. `owner` arguments: None stands for everybody.

    Methods raise Refusal: UNAVAILABLE while another process owns the folder, NOT_FOUND for what the owner has not.
    """

    def __init__(self, path: Path, worker: Worker, limits: Limits, *, now: Callable[[], float] = time.time) -> None:
        self._folder = JobsFolder(path)
        self._worker = worker
        self._limits = limits
        self._now = now
        self._store: StoreThread | None = None  # None: another process owns the folder
        self._runs: dict[str, JobRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()  # a new one each time something has happened
        self._slots = asyncio.Semaphore(limits.max_running)
        self._num_ended: Counter[bool] = Counter()  # items in the life of this process; True: with an error
        self._num_arriving = 0  # bytes of uploads that are not in the store yet

    async def open(self) -> None:
        """Begins, at once or when whoever owns the folder has gone. Raises StoreError and OSError."""
        if await self._take():
            await self._begin()
        else:
            logger.warning("another process owns the jobs in %s; waiting for it", self._folder.path)
            self._spawn(self._wait_for_folder)

    async def close(self) -> None:
        """What runs is begun again by the next process that opens the folder."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._store is not None:
            store, self._store = self._store, None
            self._note_progress()  # whoever follows results hears that there are no more
            await store.close()
        self._folder.release()

    # -- files --------------------------------------------------------------------------------------------------------

    async def upload(self, pieces: AsyncIterator[bytes], *, owner: str, name: str) -> FileRecord:
        """A file whose content arrives in pieces."""
        check_file_name(name)
        await self._take_room(0)
        upload, num_bytes = await asyncio.to_thread(self._folder.upload), 0
        try:
            async for piece in pieces:
                await self._take_room(len(piece))
                num_bytes += len(piece)
                await asyncio.to_thread(upload.write, piece)
            record = await asyncio.to_thread(upload.finish, owner, name, int(self._now()))
            await self._call(JobStore.add_file, record)
        except BaseException:
            upload.discard()
            raise
        finally:
            self._num_arriving -= num_bytes
        return record

    async def _take_room(self, num_bytes: int) -> None:
        """For so many bytes more that arrive. Raises Refusal."""
        num_stored = await self._call(JobStore.total_upload_bytes)
        if num_stored + self._num_arriving + num_bytes > self._limits.max_bytes:
            raise self._full()
        self._num_arriving += num_bytes

    async def file(self, file_id: str, owner: str | None) -> FileRecord:
        record = await self._call(JobStore.file, file_id, owner)
        if record is None:
            raise _unknown("file", file_id)
        return record

    async def files(self, owner: str | None, page: Page, purpose: str = "") -> list[FileRecord]:
        return await self._call(JobStore.files, owner, page, purpose)

    async def delete_file(self, file_id: str, owner: str | None) -> None:
        record = await self.file(file_id, owner)
        if not await self._call(JobStore.delete_file, record):
            message = f"file: {shown(file_id)} is the input of a job that has not ended; cancel the job first"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message)
        await asyncio.to_thread(self._folder.remove, file_id)

    async def content(self, record: FileRecord) -> AsyncIterator[bytes]:
        """Of a file, in pieces."""
        if record.job:
            async for results in self._pages(record):
                yield "".join(result.line + "\n" for result in results).encode()
            return
        for start in range(0, record.num_bytes, _PIECE_BYTES):
            yield await asyncio.to_thread(self._folder.read, record.id, start, _PIECE_BYTES)

    async def _pages(self, record: FileRecord) -> AsyncIterator[list[Result]]:
        last = -1
        while page := await self._call(JobStore.results, record.job, last, _PIECE_BYTES, is_error=record.holds_errors):
            yield page
            last = page[-1].number

    # -- jobs ---------------------------------------------------------------------------------------------------------

    async def submit(self, order: JobOrder) -> JobView:
        """A job that begins at once, or the one that was submitted under the same idempotency key."""
        try:
            job, is_new = await self._call(JobStore.add_job, order)
        except KeyTakenError as err:
            message = f"idempotency_key: {shown(order.idempotency_key)} was used for another job; choose a new one"
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, message) from err
        except NoInputError as err:
            raise _unknown("file", order.input_file) from err
        if is_new:
            self._run(job)
        return self._view(job)

    async def submit_upload(self, pieces: AsyncIterator[bytes], order: JobOrder, *, name: str) -> JobView:
        """The same with an input that arrives in pieces."""
        record = await self.upload(pieces, owner=order.owner, name=name)
        try:
            view = await self.submit(replace(order, input_file=record.id, input_sha256=record.sha256))
        except Refusal:
            await self.delete_file(record.id, None)
            raise
        if view.job.order.input_file != record.id:  # it was submitted before
            await self.delete_file(record.id, None)
        return view

    async def job(self, job_id: str, owner: str | None) -> JobView:
        return self._view(await self._known(job_id, owner))

    async def jobs(self, owner: str | None, page: Page) -> list[JobView]:
        return [self._view(job) for job in await self._call(JobStore.jobs, owner, page)]

    async def watched(self, limit: int) -> list[JobView]:
        """Of everybody: those that have not ended, then the others, newest first."""
        return [self._view(job) for job in await self._call(JobStore.watched_jobs, limit)]

    async def cancel(self, job_id: str, owner: str | None) -> JobView:
        """Items that have ended keep their results, the others get an error. Nothing if the job has ended."""
        await self._known(job_id, owner)
        job = await self._call(JobStore.stop, job_id, JobStatus.CANCELLING)
        if run := self._runs.get(job_id):
            run.stop()
        return self._view(job)

    async def results(self, job_id: str, owner: str | None, *, after: int, follow: bool) -> AsyncIterator[Result]:
        """In the order of the items, those with numbers beyond `after`. `follow`: until the job has ended."""
        while True:
            progress = self._progress
            job = await self._known(job_id, owner)
            while page := await self._call(JobStore.results_in_turn, job_id, after, _PIECE_BYTES):
                for result in page:
                    yield result
                after = page[-1].number
            if job.status.is_ended or not follow:
                return
            await progress.wait()

    async def numbers(self) -> JobNumbers:
        num_left, oldest = await self._call(JobStore.waiting)
        return JobNumbers(
            by_status=await self._call(JobStore.count_jobs),
            num_left=num_left,
            oldest_age_s=0.0 if oldest is None else max(0.0, self._now() - oldest),
            num_completed=self._num_ended[False],
            num_failed=self._num_ended[True],
        )

    async def _known(self, job_id: str, owner: str | None) -> Job:
        job = await self._call(JobStore.job, job_id, owner)
        if job is None:
            raise _unknown("job", job_id)
        return job

    def _view(self, job: Job) -> JobView:
        run = self._runs.get(job.id)
        return JobView(job=job, items_per_s=run.pace.items_per_s(time.monotonic()) if run else None)

    # -- work ---------------------------------------------------------------------------------------------------------

    async def _take(self) -> bool:
        if not await asyncio.to_thread(self._folder.take):
            return False
        self._store = StoreThread(await asyncio.to_thread(self._open_store))
        return True

    def _open_store(self) -> JobStore:
        store = JobStore(self._folder.store_path, self._now)
        self._folder.keep_only(store.upload_ids())  # before anything can arrive
        return store

    async def _wait_for_folder(self) -> None:
        while not await self._take():  # noqa: ASYNC110  # who has the lock is another process
            await asyncio.sleep(_TAKE_AGAIN_S)
        logger.info("this process owns the jobs in %s now", self._folder.path)
        await self._begin()

    async def _begin(self) -> None:
        assert self._store is not None, "the folder is ours"
        self._spawn(self._store.run)
        self._spawn(self._sweep)
        for job in await self._call(JobStore.unfinished_jobs):
            self._run(job)

    def _run(self, job: Job) -> None:
        assert self._store is not None, "the folder is ours"
        means = Means(
            folder=self._folder,
            store=self._store,
            worker=self._worker,
            slots=self._slots,
            max_line_bytes=self._limits.max_line_bytes,
            on_progress=self._note_progress,
            on_result=self._note_result,
            now=self._now,
        )
        self._spawn(partial(self._run_to_its_end, job, means))

    async def _run_to_its_end(self, job: Job, means: Means) -> None:
        while True:
            self._runs[job.id] = run = JobRun(job, means)
            try:
                await run.run()
            except Exception:
                logger.exception("job %s stumbled, and goes on in %g s", job.id, _RUN_AGAIN_S)
            else:
                del self._runs[job.id]
                return
            await asyncio.sleep(_RUN_AGAIN_S)
            job = await self._known(job.id, None)

    async def _sweep(self) -> None:
        """Removes what is old."""
        while True:
            before = int(self._now() - self._limits.retention_s)
            for job in await self._call(JobStore.old_jobs, before):
                await self._delete(job)
            for record in await self._call(JobStore.old_uploads, before):
                if await self._call(JobStore.delete_file, record):
                    await asyncio.to_thread(self._folder.remove, record.id)
            await asyncio.sleep(_SWEEP_S)

    async def _delete(self, job: Job) -> None:
        while await self._call(JobStore.delete_some, job):
            pass
        for record in await self._call(JobStore.delete_job, job):
            await asyncio.to_thread(self._folder.remove, record.id)
        logger.info("removed job %s, which ended long ago", job.id)

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(_logging_failures(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    def _note_result(self, result: Result) -> None:
        self._num_ended[result.is_error] += 1

    async def _call(self, method: Callable[Concatenate[JobStore, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._store is None:
            message = f"jobs: this gateway does not own {self._folder.path}, or is shutting down; try again later"
            raise Refusal(grpc.StatusCode.UNAVAILABLE, message)
        return await self._store.call(method, *args, **kwargs)

    def _full(self) -> Refusal:
        message = (
            f"file: all uploads together may take {self._limits.max_bytes} bytes (jobs.max_bytes); delete some that "
            "are not needed any more"
        )
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


async def _logging_failures(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await work()
    except Exception:
        logger.exception("a part of the jobs has failed")


def _unknown(what: str, name: str) -> Refusal:
    return Refusal(grpc.StatusCode.NOT_FOUND, f"{what}: {shown(name)} is not known here")
