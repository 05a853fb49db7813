"""What operators ask over HTTP: the Control service and jobs as JSON, and rounds as they happen."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from google.protobuf.json_format import MessageToDict, MessageToJson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from echelon.pb.control_pb2 import ReplicaTraceRequest
from echelon.pb.scheduler_pb2 import TracedMove, TracedRound, TracedWait, TraceEvent, TraceRequest
from echelon.pb.worker_pb2 import EngineRole, MoveOrder
from gateway.doors.http_access import check_again
from gateway.doors.http_errors import HttpProblem, error_body, problem_of, problem_response
from gateway.doors.http_exchange import unless_client_leaves
from gateway.doors.http_reply import HttpReply
from gateway.doors.job_messages import job_message
from gateway.jobs.jobs import Jobs
from gateway.operations import Operations
from gateway.requests.refusal import Refusal, invalid, shown

_BATCH_S = 0.25
_MOST_JOBS = 20
_MOST_UNSENT = 4096  # events that wait for a slow client; later ones are dropped


def control_routes(operations: Operations, jobs: Jobs | None) -> list[Route]:
    async def status(request: Request) -> Response:
        answer = MessageToJson(await operations.status(), preserving_proto_field_name=True, indent=None)
        return Response(answer, headers={"cache-control": "no-store"}, media_type="application/json")

    async def watched_jobs(request: Request) -> Response:
        views = [] if jobs is None else await jobs.watched(_MOST_JOBS)
        messages = [MessageToDict(job_message(view), preserving_proto_field_name=True) for view in views]
        return JSONResponse({"kept": jobs is not None, "jobs": messages}, headers={"cache-control": "no-store"})

    return [
        Route("/control/status", status),
        Route("/control/jobs", watched_jobs),
        Route("/control/rounds", _RoundsEndpoint(operations)),
    ]


@dataclass(frozen=True, slots=True)
class _RoundsEndpoint:
    """An ASGI application: server-sent events, several a second, each with what happened since the one before it.

    The recording has no spans, so that nobody waits for it, and it ends when the client leaves.
    """

    operations: Operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = HttpReply(scope, receive, send)
        try:
            request = Request(scope)
            trace = ReplicaTraceRequest(replica=_replica(request), trace=TraceRequest(rounds_only=True))
            batches = _batches(self.operations, trace, partial(check_again, request))
            await unless_client_leaves(reply.stream(batches), receive)
        except Refusal as refusal:
            problem = problem_of(refusal)
            await reply.fail(problem_response(problem), json.dumps(error_body(problem)))


def _replica(request: Request) -> int:
    if request.method != "GET":
        raise HttpProblem(405, f"{request.method} {request.url.path} is not served here", {"allow": "GET"})
    given = request.query_params.get("replica", "0")
    if not (given.isascii() and given.isdecimal() and len(given) <= 6):
        raise invalid(f"replica: must be the number of a replica, got {shown(given)}")
    return int(given)


async def _batches(operations: Operations, trace: ReplicaTraceRequest, check: Callable[[], None]) -> AsyncIterator[str]:
    """`check` raises Refusal where its reader may read no more."""
    async with operations.recording(trace) as events:
        began_s = time.monotonic()
        unsent: list[TraceEvent] = []
        reading = asyncio.create_task(_collect(events, unsent))
        try:
            is_over = False
            while not is_over:
                await asyncio.wait((reading,), timeout=_BATCH_S)
                is_over = reading.done()
                check()
                if unsent or not is_over:
                    yield _batch(unsent, time.monotonic() - began_s)
                unsent.clear()
            reading.result()
        finally:
            reading.cancel()


async def _collect(events: AsyncIterator[TraceEvent], unsent: list[TraceEvent]) -> None:
    async for event in events:
        if len(unsent) < _MOST_UNSENT:
            unsent.append(event)


def _batch(events: list[TraceEvent], elapsed_s: float) -> str:
    return json.dumps(
        {
            "elapsed_us": round(1e6 * elapsed_s),
            "rounds": [_round(event.round) for event in events if event.HasField("round")],
            "waits": [_wait(event.wait) for event in events if event.HasField("wait")],
            "moves": [_move(event.move) for event in events if event.HasField("move")],
        }
    )


def _round(traced: TracedRound) -> dict[str, Any]:
    """The group's clock is another one than the scheduler's: it began in the middle of when it can have begun."""
    began_ns = (traced.sent_ns + traced.queue_ns + traced.received_ns - traced.run_ns) // 2
    return {
        "engine": _engine(traced.engine),
        "sent_us": traced.sent_ns // 1000,
        "began_us": max(traced.sent_ns, began_ns) // 1000,
        "run_us": traced.run_ns // 1000,
        "received_us": traced.received_ns // 1000,
        "rows": traced.num_rows,
        "steps": traced.num_steps,
    }


def _wait(wait: TracedWait) -> dict[str, Any]:
    return {"engine": _engine(wait.engine), "began_us": wait.start_ns // 1000, "run_us": wait.run_ns // 1000}


def _move(move: TracedMove) -> dict[str, Any]:
    return {
        "engine": _engine(move.engine),
        "kind": MoveOrder.Kind.Name(move.kind).lower(),
        "sent_us": move.sent_ns // 1000,
        "received_us": move.received_ns // 1000,
        "blocks": move.num_blocks,
        "failed": move.num_failed,
    }


def _engine(role: EngineRole.ValueType) -> str:
    return EngineRole.Name(role).removeprefix("ENGINE_ROLE_").lower()
