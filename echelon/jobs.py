"""Durable jobs: many requests at once, whose results are kept until they are fetched.

    with Client("127.0.0.1:50051") as client:
        job = client.jobs.submit([{"prompt": "def add(", "max_tokens": 16}, {"prompt": "import ", "max_tokens": 16}])
        for result in client.jobs.results(job.job_id):
            print(result.custom_id, result.body["choices"][0]["text"])

Requests are bodies of OpenAI's /v1/completions and /v1/chat/completions, or lines as in the files of its batches.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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


class JobsClient:
    """`client.jobs`. Methods raise the errors of `echelon.errors`."""

    def __init__(self, channel: grpc.Channel, address: str, metadata: Metadata) -> None:
        self._stub = jobs_pb2_grpc.JobsStub(channel)
        self._address = address
        self._metadata = metadata

    def submit(
        self,
        requests: Requests,
        *,
        completion_window_s: float | None = None,
        idempotency_key: str = "",
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Uploads the requests and returns once the job survives everything.

        With `idempotency_key`, a repetition returns the first one's job. `seed` makes the results of items without
        seeds of their own repeatable. After `completion_window_s` (default: a day) the job expires. Raises what reading
        the requests raises, such as OSError, and then nothing is submitted.
        """
        options = jobs_pb2.JobOptions(
            completion_window_s=completion_window_s,
            idempotency_key=idempotency_key,
            seed=seed,
            metadata=dict(metadata or {}),
            name=Path(requests).name if isinstance(requests, str | Path) else "",
        )
        messages = _Messages(options, requests)
        try:
            return job_of(self._stub.SubmitJob(iter(messages), metadata=self._metadata))
        except grpc.RpcError as err:
            if messages.problem is not None:
                raise messages.problem from err
            raise error_from_call(err, self._address) from err

    def get(self, job_id: str) -> Job:
        try:
            return job_of(self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id), metadata=self._metadata))
        except grpc.RpcError as err:
            raise error_from_call(err, self._address) from err

    def list(self) -> Iterator[Job]:
        """Newest first; read as you go."""
        after, has_more = "", True
        while has_more:
            request = jobs_pb2.ListJobsRequest(limit=100, after=after)
            try:
                page = self._stub.ListJobs(request, metadata=self._metadata)
            except grpc.RpcError as err:
                raise error_from_call(err, self._address) from err
            yield from map(job_of, page.jobs)
            has_more = page.has_more
            after = page.jobs[-1].job_id if page.jobs else ""

    def cancel(self, job_id: str) -> Job:
        """Items that have ended keep their results; the others get an error."""
        try:
            return job_of(self._stub.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id), metadata=self._metadata))
        except grpc.RpcError as err:
            raise error_from_call(err, self._address) from err

    def results(self, job_id: str, *, after: int | None = None, follow: bool = True) -> Iterator[JobResult]:
        """In the order of the items. `follow`: waits for those that are missing, until the job has ended. `after`: only
        of items with a larger number, to go on where an earlier call was lost."""
        request = jobs_pb2.StreamResultsRequest(job_id=job_id, after=after, follow=follow)
        try:
            for result in self._stub.StreamResults(request, metadata=self._metadata):
                yield JobResult(number=result.number, is_error=result.is_error, line=result.line)
        except grpc.RpcError as err:
            raise error_from_call(err, self._address) from err


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


class _Messages:
    """Of a submission. grpc swallows what an iterator raises, so it is kept: `problem`."""

    def __init__(self, options: jobs_pb2.JobOptions, requests: Requests) -> None:
        self.problem: Exception | None = None
        self._options = options
        self._requests = requests

    def __iter__(self) -> Iterator[jobs_pb2.SubmitJobRequest]:
        try:
            yield jobs_pb2.SubmitJobRequest(options=self._options)
            for piece in _pieces(self._requests):
                yield jobs_pb2.SubmitJobRequest(data=piece)
        except Exception as err:
            self.problem = err
            raise


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


def line_of(number: int, request: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a batch as it is; a body with its number as custom_id, for the path that its fields show."""
    if "body" in request:
        return dict(request)
    url = "/v1/chat/completions" if "messages" in request else "/v1/completions"
    return {"custom_id": str(number), "method": "POST", "url": url, "body": dict(request)}
