"""Errors as clients of OpenAI's API expect them."""

import json
import re
from typing import Any

import grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.requests.refusal import Refusal

_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The beginning of a message, as in "messages[0].role: is empty"; a "request" is not a field.
_FIELD = re.compile(r"(?!request: )([a-z_]+(?:\[\d+\])*(?:\.\w+(?:\[\d+\])*)*): ")


class HttpProblem(Exception):
    """Why a request is not answered as its client hoped. `message` is for the client."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.message = message
        self.headers = headers or {}
        super().__init__(message)


def problem_of(refusal: Refusal) -> HttpProblem:
    # Clients try again after some statuses. The one that set a time limit would exceed it again.
    headers = {"x-should-retry": "false"} if refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED else None
    return HttpProblem(_STATUSES.get(refusal.code, 500), refusal.message, headers)


def error_body(problem: HttpProblem) -> dict[str, Any]:
    status = problem.status
    field = _FIELD.match(problem.message) if status in (400, 404) else None
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {"message": problem.message, "type": kind, "param": field[1] if field else None, "code": str(status)}
    }


def problem_response(problem: HttpProblem, body: dict[str, Any] | None = None) -> Response:
    """`body`: as another API than OpenAI's has it."""
    text = json.dumps(body or error_body(problem))
    return Response(text, problem.status, problem.headers, media_type="application/json")


async def answer_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HttpProblem), "registered for these"
    return problem_response(problem)


async def answer_refusal(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal), "registered for these"
    return problem_response(problem_of(refusal))


async def answer_http_exception(request: Request, problem: Exception) -> Response:
    """What the router has to say: there is no such path, or it does not know the method."""
    assert isinstance(problem, HTTPException), "registered for these"
    message = f"{request.method} {request.url.path} is not served here ({problem.detail})"
    return problem_response(HttpProblem(problem.status_code, message, dict(problem.headers or {})))


async def answer_nobody(request: Request, problem: Exception) -> Response:
    """The client has gone."""
    return Response(status_code=499)


async def answer_failure(request: Request, failure: Exception) -> Response:
    return problem_response(HttpProblem(500, "the gateway could not process the request; its log says why"))


async def answer_too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application."""
    problem = HttpProblem(503, "too many connections are open; try again later", {"connection": "close"})
    await problem_response(problem)(scope, receive, send)
