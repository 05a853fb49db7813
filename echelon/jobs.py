"""Durable jobs: many requests at once, whose results are kept until they are fetched.

    with Client("127.0.0.1:50051") as client:
        job = client.jobs.submit([{"prompt": "def add(", "max_tokens": 16}, {"prompt": "import ", "max_tokens": 16}])
        for result in client.jobs.results(job.job_id):
            print(result.custom_id, result.body["choices"][0]["text"])

Requests are bodies of OpenAI's /v1/completions and /v1/chat/completions, or lines as in the files of its batches.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import grpc

from echelon.channel import Metadata
from echelon.errors import error_from_call
from echelon.pb import jobs_pb2, jobs_pb2_grpc

Requests = str | Path | Iterable[Mapping[str, Any]]
"""The path of a file of lines; or bodies, or lines, one after the other. They are never all in memory."""

_PIECE_BYTES = 256 << 10
_ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The state of a job. Times are seconds since 1970; None: not yet, or not known."""

    job_id: str
    state: str  # "validating", "in_progress", "finalizing", "cancelling", and those of a job that has ended
    num_items: int
    num_completed: int
    num_failed: int
    prompt_tokens: int
    completion_tokens: int
    items_per_s: float | None
    eta_s: float | None
    created_at: int
    started_at: int | None
    ended_at: int | None
    expires_at: int
    problems: tuple[str, ...]  # why it failed
    metadata: Mapping[str, str] = field(default_factory=dict)
    input_file: str = ""  # ids of files, of the HTTP API
    output_file: str = ""
    error_file: str = ""
    seed: int = 0

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What came of one item."""

    number: int  # its line, from 0
    is_error: bool
    line: str  # JSON, as in the files of OpenAI's batches

    @property
    def custom_id(self) -> str:
        return cast(str, json.loads(self.line)["custom_id"])

    @property
    def body(self) -> Any:
        """The answer, or {"error": ...}."""
        content = json.loads(self.line)
        return content["response"]["body"] if content["response"] else {"error": content["error"]}


class SubmitOptions(TypedDict, total=False):
    """What `submit` takes beside the requests."""

    completion_window_s: float | None  # after which the job expires; default: a day
    idempotency_key: str  # a repetition with it returns the first one's job
    seed: int | None  # makes the results of items without seeds of their own repeatable; default: drawn
    metadata: Mapping[str, str]


class JobsClient:
    """`client.jobs`. Methods raise the errors of `echelon.errors`."""

    def __init__(self, channel: grpc.Channel, address: str, metadata: Metadata) -> None:
        self._stub = jobs_pb2_grpc.JobsStub(channel)
        self._address = address
        self._metadata = metadata

    def submit(self, requests: Requests, **options: Unpack[SubmitOptions]) -> Job:
        """Uploads the requests and returns once the job survives everything. Keywords are those of `SubmitOptions`.

        Raises what reading the requests raises, such as OSError, and then nothing is submitted.
        """
        submission = _Submission(requests, options)
        with _named_errors(self._address), submission.own_problems():
            return job_of(self._stub.SubmitJob(iter(submission), metadata=self._metadata))

    def get(self, job_id: str) -> Job:
        with _named_errors(self._address):
            return job_of(self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id), metadata=self._metadata))

    def list(self) -> Iterator[Job]:
        """Newest first; read as you go."""
        request: jobs_pb2.ListJobsRequest | None = _FIRST_PAGE
        while request is not None:
            with _named_errors(self._address):
                page = self._stub.ListJobs(request, metadata=self._metadata)
            yield from map(job_of, page.jobs)
            request = _after(page)

    def cancel(self, job_id: str) -> Job:
        """Items that have ended keep their results; the others get an error."""
        with _named_errors(self._address):
            return job_of(self._stub.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id), metadata=self._metadata))

    def results(self, job_id: str, *, after: int | None = None, follow: bool = True) -> Iterator[JobResult]:
        """In the order of the items. `follow`: waits for those that are missing, until the job has ended. `after`: only
        of items with a larger number, to go on where an earlier call was lost."""
        request = jobs_pb2.StreamResultsRequest(job_id=job_id, after=after, follow=follow)
        with _named_errors(self._address):
            for result in self._stub.StreamResults(request, metadata=self._metadata):
                yield _result_of(result)


class AsyncJobsClient:
    """`JobsClient` for asyncio. `list` and `results` need no await, what comes from them does."""

    def __init__(self, channel: grpc.aio.Channel, address: str, metadata: Metadata) -> None:
        # The stubs' declarations know asynchronous methods under another name than the code does.
        self._stub = cast("jobs_pb2_grpc.JobsAsyncStub", jobs_pb2_grpc.JobsStub(channel))
        self._address = address
        self._metadata = metadata

    async def submit(self, requests: Requests, **options: Unpack[SubmitOptions]) -> Job:
        """See JobsClient. The requests are read in another thread."""
        submission = _Submission(requests, options)
        with _named_errors(self._address), submission.own_problems():
            return job_of(await self._stub.SubmitJob(aiter(submission), metadata=self._metadata))

    async def get(self, job_id: str) -> Job:
        with _named_errors(self._address):
            return job_of(await self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id), metadata=self._metadata))

    async def list(self) -> AsyncIterator[Job]:
        """Newest first; read as you go."""
        request: jobs_pb2.ListJobsRequest | None = _FIRST_PAGE
        while request is not None:
            with _named_errors(self._address):
                page = await self._stub.ListJobs(request, metadata=self._metadata)
            for job in page.jobs:
                yield job_of(job)
            request = _after(page)

    async def cancel(self, job_id: str) -> Job:
        """Items that have ended keep their results; the others get an error."""
        with _named_errors(self._address):
            return job_of(await self._stub.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id), metadata=self._metadata))

    async def results(self, job_id: str, *, after: int | None = None, follow: bool = True) -> AsyncIterator[JobResult]:
        """See JobsClient."""
        request = jobs_pb2.StreamResultsRequest(job_id=job_id, after=after, follow=follow)
        call = self._stub.StreamResults(request, metadata=self._metadata)
        try:
            with _named_errors(self._address):
                async for result in call:
                    yield _result_of(result)
        finally:
            call.cancel()


@contextmanager
def _named_errors(address: str) -> Iterator[None]:
    """Raises the errors of `echelon.errors` in the place of grpc's."""
    try:
        yield
    except grpc.RpcError as err:
        raise error_from_call(err, address) from err


_FIRST_PAGE = jobs_pb2.ListJobsRequest(limit=100)


def _after(page: jobs_pb2.ListJobsResponse) -> jobs_pb2.ListJobsRequest | None:
    """What asks for the page after this one; None: it is the last."""
    return jobs_pb2.ListJobsRequest(limit=100, after=page.jobs[-1].job_id) if page.has_more else None


def _result_of(message: jobs_pb2.JobResult) -> JobResult:
    return JobResult(number=message.number, is_error=message.is_error, line=message.line)


def job_of(message: jobs_pb2.Job) -> Job:
    return Job(
        job_id=message.job_id,
        state=jobs_pb2.JobState.Name(message.state).removeprefix("JOB_STATE_").lower(),
        num_items=message.num_items,
        num_completed=message.num_completed,
        num_failed=message.num_failed,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        items_per_s=message.items_per_s if message.HasField("items_per_s") else None,
        eta_s=message.eta_s if message.HasField("eta_s") else None,
        created_at=message.created_at,
        started_at=message.started_at or None,
        ended_at=message.ended_at or None,
        expires_at=message.expires_at,
        problems=tuple(_problem(problem) for problem in message.problems),
        metadata=dict(message.metadata),
        input_file=message.input_file,
        output_file=message.output_file,
        error_file=message.error_file,
        seed=message.seed,
    )


def _problem(problem: jobs_pb2.JobProblem) -> str:
    return f"line {problem.line}: {problem.message}" if problem.line else problem.message


class _Submission:
    """The messages of a submission, to iterate over once, in either way."""

    def __init__(self, requests: Requests, options: SubmitOptions) -> None:
        self._requests = requests
        self._options = jobs_pb2.JobOptions(
            **options, name=Path(requests).name if isinstance(requests, str | Path) else ""
        )
        self._problem: Exception | None = None

    @contextmanager
    def own_problems(self) -> Iterator[None]:
        """Raises what reading the requests has raised: grpc swallows it, and cancels the call."""
        try:
            yield
        except (grpc.RpcError, asyncio.CancelledError) as err:
            if self._problem is None:
                raise
            raise self._problem from err

    def __iter__(self) -> Iterator[jobs_pb2.SubmitJobRequest]:
        try:
            yield jobs_pb2.SubmitJobRequest(options=self._options)
            for piece in _pieces(self._requests):
                yield jobs_pb2.SubmitJobRequest(data=piece)
        except Exception as err:
            self._problem = err
            raise

    async def __aiter__(self) -> AsyncIterator[jobs_pb2.SubmitJobRequest]:
        messages = iter(self)
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            yield message


def _pieces(requests: Requests) -> Iterator[bytes]:
    """The lines as bytes, some at a time. Raises OSError for a file that cannot be read."""
    if isinstance(requests, str | Path):
        with Path(requests).open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                yield piece
        return
    piece = b""
    for number, request in enumerate(requests):
        piece += json.dumps(line_of(number, request)).encode() + b"\n"
        if len(piece) >= _PIECE_BYTES:
            yield piece
            piece = b""
    yield piece


def line_of(number: int, request: object) -> dict[str, Any]:
    """A line of a batch as it is; a body with its number as custom_id, for the path that its fields show. Raises
    TypeError for what is neither."""
    if not isinstance(request, Mapping):
        got = type(request).__name__
        raise TypeError(f"requests[{number}]: must be the body of a request or a line of a batch, got {got}")
    if "body" in request:
        return dict(request)
    url = "/v1/chat/completions" if "messages" in request else "/v1/completions"
    return {"custom_id": str(number), "method": "POST", "url": url, "body": dict(request)}
