"""OpenAI's /v1/batches: durable jobs."""

import json
import re
import secrets
from typing import Any

import grpc
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.access.caller import Caller
from gateway.doors.http_access import caller_of
from gateway.doors.http_exchange import BodyReader
from gateway.doors.openai.paging import page_of, write_page
from gateway.jobs.checks import check_order
from gateway.jobs.jobs import Jobs, JobView
from gateway.jobs.records import Job, JobOrder, JobStatus, Purpose
from gateway.requests.openai.bodies import BatchBody, parse_body
from gateway.requests.refusal import Refusal, invalid, shown

_PATH = "/v1/batches"
_WINDOW = re.compile(r"([0-9]{1,7})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class BatchPaths:
    def __init__(self, jobs: Jobs, bodies: BodyReader) -> None:
        self._jobs = jobs
        self._bodies = bodies

    def routes(self) -> list[Route]:
        return [
            Route(_PATH, self.create, methods=["POST"]),
            Route(_PATH, self.list),
            Route(f"{_PATH}/{{id}}", self.read),
            Route(f"{_PATH}/{{id}}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        body = parse_body(BatchBody, await self._bodies.read(request))
        order = await self._order(body, caller_of(request), request.headers.get("idempotency-key", ""))
        check_order(order, body.metadata or {})
        return JSONResponse(_object(await self._jobs.submit(order)))

    async def list(self, request: Request) -> Response:
        page = page_of(request)
        views = await self._jobs.jobs(caller_of(request).sees, page)
        return write_page([_object(view) for view in views], page)

    async def read(self, request: Request) -> Response:
        return JSONResponse(_object(await self._jobs.job(request.path_params["id"], caller_of(request).sees)))

    async def cancel(self, request: Request) -> Response:
        return JSONResponse(_object(await self._jobs.cancel(request.path_params["id"], caller_of(request).sees)))

    async def _order(self, body: BatchBody, caller: Caller, idempotency_key: str) -> JobOrder:
        """Raises Refusal."""
        try:
            record = await self._jobs.file(body.input_file_id, caller.sees)
        except Refusal as refusal:
            if refusal.code is not grpc.StatusCode.NOT_FOUND:
                raise
            raise invalid(f"input_file_id: {shown(body.input_file_id)} is not the id of a file") from refusal
        if record.purpose is not Purpose.BATCH:
            raise invalid(f"input_file_id: {shown(body.input_file_id)} was not uploaded for batches")
        return JobOrder(
            owner=caller.name,
            input_file=record.id,
            input_sha256=record.sha256,
            endpoint=body.endpoint,
            window_s=_window_s(body.completion_window),
            window=body.completion_window,
            seed=secrets.randbits(64) if body.seed is None else body.seed,
            metadata=json.dumps(body.metadata or {}, sort_keys=True),
            salt=caller.record.cache_salt,
            idempotency_key=idempotency_key,
        )


def _window_s(text: str) -> float:
    """Raises Refusal."""
    match = _WINDOW.fullmatch(text)
    if match is None:
        raise invalid(f'completion_window: must be a number and s, m, h or d, like "24h", got {shown(text)}')
    number, unit = match.groups()
    return float(number) * _UNIT_S[unit]


def _object(view: JobView) -> dict[str, Any]:
    job = view.job
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.order.endpoint,
        "errors": _errors(job),
        "input_file_id": job.order.input_file,
        "completion_window": job.order.window,
        "status": job.status,
        "output_file_id": job.output_file or None,
        "error_file_id": job.error_file or None,
        "created_at": job.created_at,
        "in_progress_at": job.started_at,
        "expires_at": job.expires_at,
        "finalizing_at": job.stopping_at if job.status in (JobStatus.FINALIZING, JobStatus.EXPIRED) else None,
        "completed_at": _ended_at(job, JobStatus.COMPLETED),
        "failed_at": _ended_at(job, JobStatus.FAILED),
        "expired_at": _ended_at(job, JobStatus.EXPIRED),
        "cancelling_at": job.stopping_at if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED) else None,
        "cancelled_at": _ended_at(job, JobStatus.CANCELLED),
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {
            "input_tokens": job.prompt_tokens,
            "output_tokens": job.completion_tokens,
            "total_tokens": job.prompt_tokens + job.completion_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
        "metadata": json.loads(job.order.metadata) or None,
        "seed": job.order.seed,
        "items_per_s": view.items_per_s,
        "eta_s": view.eta_s,
    }


def _errors(job: Job) -> dict[str, Any] | None:
    problems = json.loads(job.problems)
    return {"object": "list", "data": problems} if problems else None


def _ended_at(job: Job, status: JobStatus) -> int | None:
    return job.ended_at if job.status is status else None
