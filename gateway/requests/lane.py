"""A queue of requests before one process that reads them."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from echelon.pb.reading_pb2 import ReadAnswer, Reading
from gateway.requests.forms import Form
from gateway.requests.reader_process import ReaderLostError, ReaderProcess
from gateway.requests.refusal import READ_LESS, Refusal, invalid, status_code

logger = logging.getLogger(__name__)


@dataclass(order=True, slots=True)
class _Job:
    """The smaller one first: it is done sooner, and many large requests keep no small one waiting."""

    num_bytes: int
    number: int
    form: Form = field(compare=False)
    data: bytes = field(compare=False)
    answer: "asyncio.Future[bytes]" = field(compare=False)


class Lane:
    """Reads requests one at a time in a process of its own, which is replaced if it dies or does not answer in time.

    The process is started for the first request, or by `open` before there is one.
    """

    def __init__(
        self, start: Callable[[], Awaitable[ReaderProcess]], *, limit_s: float, max_waiting_bytes: int
    ) -> None:
        """`limit_s` is how long an answer may take, the process's own limit and some patience."""
        self._start = start
        self._limit_s = limit_s
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._jobs: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._worker: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Idempotent; within a running event loop."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Ends the process and cancels everyone who still waits for an answer."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        while not self._jobs.empty():
            self._jobs.get_nowait().answer.cancel()

    async def read(self, form: Form, data: bytes) -> Reading:
        """What a request asks of a scheduler. Raises Refusal."""
        if self._waiting_bytes + len(data) > self._max_waiting_bytes:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"requests of {self._waiting_bytes} bytes wait to be read, and at most {self._max_waiting_bytes} may; "
                "try again later",
            )
        self.open()
        job = _Job(len(data), next(self._numbers), form, data, asyncio.get_running_loop().create_future())
        self._put(job)
        answer = ReadAnswer.FromString(await job.answer)
        if answer.HasField("refusal"):
            raise Refusal(status_code(answer.refusal.code), answer.refusal.message)
        return answer.reading

    async def _work(self) -> None:
        while True:
            try:
                process = await self._start()
            except ReaderLostError as err:
                logger.error("the process that reads requests did not start: %s", err)
                problem = Refusal(grpc.StatusCode.UNAVAILABLE, f"requests of this kind cannot be read now: {err}")
                _fail(await self._next(), problem)
                continue
            try:
                await self._serve(process)
            finally:
                await process.end()

    async def _serve(self, process: ReaderProcess) -> None:
        """Until the process is lost."""
        while True:
            job = await self._next()
            if not process.is_alive:
                self._put(job)
                return
            try:
                answer = await process.ask(job.form, job.data, limit_s=self._limit_s)
            except ReaderLostError as err:
                logger.warning("gave up the process that read a request of %d bytes: %s", job.num_bytes, err)
                _fail(job, invalid(f"request: reading it was given up, because {err}; {READ_LESS}"))
                return
            except asyncio.CancelledError:
                job.answer.cancel()
                raise
            if not job.answer.done():
                job.answer.set_result(answer)

    def _put(self, job: _Job) -> None:
        self._waiting_bytes += job.num_bytes
        self._jobs.put_nowait(job)

    async def _next(self) -> _Job:
        """The next one that somebody still waits for."""
        while True:
            job = await self._jobs.get()
            self._waiting_bytes -= job.num_bytes
            if not job.answer.done():
                return job


def _fail(job: _Job, refusal: Refusal) -> None:
    if not job.answer.done():
        job.answer.set_exception(refusal)
