"""The Jobs service: durable jobs over gRPC."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator

import grpc

from childproc.tokens_file import Scope
from echelon.pb import jobs_pb2
from gateway.access.caller import Caller
from gateway.access.tokens import Tokens
from gateway.doors.grpc_access import caller_of, while_known
from gateway.doors.job_messages import job_message
from gateway.doors.service_handlers import Context
from gateway.jobs.checks import DEFAULT_WINDOW_S, check_order
from gateway.jobs.jobs import Jobs, JobView
from gateway.jobs.records import JobOrder
from gateway.jobs.store import Page
from gateway.requests.refusal import Refusal, invalid
from gateway.requests.wire import Malformed, strict_decoder

_DEFAULT_PAGE, _MAX_PAGE = 20, 100
_PIECE_S = 60.0  # for the next piece of an upload to arrive
_decode = strict_decoder(jobs_pb2.SubmitJobRequest)


class JobsServicer:
    """Serves every method of `echelon.v1.Jobs`. They raise Refusal."""

    def __init__(self, jobs: Jobs, tokens: Tokens) -> None:
        self._jobs = jobs
        self._tokens = tokens

    async def SubmitJob(self, requests: AsyncIterator[bytes], context: Context) -> jobs_pb2.Job:
        return job_message(await self._submit(requests, self._caller(context)))

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.Job:
        return job_message(await self._jobs.job(request.job_id, self._owner(context)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        limit = request.limit or _DEFAULT_PAGE
        if limit > _MAX_PAGE:
            raise invalid(f"limit: must be at most {_MAX_PAGE}, got {limit}")
        views = await self._jobs.jobs(self._owner(context), Page(limit=limit + 1, after=request.after))
        return jobs_pb2.ListJobsResponse(jobs=map(job_message, views[:limit]), has_more=len(views) > limit)

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Context) -> jobs_pb2.Job:
        return job_message(await self._jobs.cancel(request.job_id, self._owner(context)))

    async def StreamResults(self, request: jobs_pb2.StreamResultsRequest, context: Context) -> None:
        after = request.after if request.HasField("after") else -1
        results = self._jobs.results(request.job_id, self._owner(context), after=after, follow=request.follow)
        async for result in while_known(results, context, self._tokens, Scope.GENERATE):
            message = jobs_pb2.JobResult(number=result.number, is_error=result.is_error, line=result.line)
            await context.write(message)

    async def _submit(self, requests: AsyncIterator[bytes], caller: Caller) -> JobView:
        options = await _options(requests)
        window_s = options.completion_window_s if options.HasField("completion_window_s") else DEFAULT_WINDOW_S
        metadata = dict(options.metadata)
        order = JobOrder(
            owner=caller.name,
            input_file="",
            input_sha256="",
            endpoint=options.endpoint,
            window_s=window_s,
            window=f"{window_s:g}s",
            seed=options.seed if options.HasField("seed") else secrets.randbits(64),
            metadata=json.dumps(metadata, sort_keys=True),
            salt=caller.record.cache_salt,
            idempotency_key=options.idempotency_key,
        )
        check_order(order, metadata)
        return await self._jobs.submit_upload(_pieces(requests), order, name=options.name or "requests.jsonl")

    def _owner(self, context: Context) -> str | None:
        return self._caller(context).sees

    def _caller(self, context: Context) -> Caller:
        """Raises Refusal where the token was revoked since the call came."""
        return caller_of(context.invocation_metadata(), self._tokens, Scope.GENERATE)


async def _options(requests: AsyncIterator[bytes]) -> jobs_pb2.JobOptions:
    """The first message. Raises Refusal."""
    first = await _next(requests)
    if first is None or not first.HasField("options"):
        raise invalid("options: must be the first message")
    return first.options


async def _pieces(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while (request := await _next(requests)) is not None:
        if not request.HasField("data"):
            raise invalid("data: must be every message but the first")
        yield request.data


async def _next(requests: AsyncIterator[bytes]) -> jobs_pb2.SubmitJobRequest | None:
    """None at the end. Raises Refusal."""
    try:
        async with asyncio.timeout(_PIECE_S):
            request = _decode(await anext(requests))
    except StopAsyncIteration:
        return None
    except TimeoutError as err:
        message = f"data: nothing came for {_PIECE_S:g} s"
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, message) from err
    if isinstance(request, Malformed):
        raise invalid(request.error)
    return request
