"""What the HTTP port asks of callers: a token for each request, before its body is read."""

import asyncio
import contextlib
from functools import partial

import grpc
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from childproc.tokens_file import Scope as TokenScope
from gateway.access.caller import Caller
from gateway.access.tokens import Tokens
from gateway.doors.http_errors import problem_of, problem_response
from gateway.requests.refusal import Refusal

_FREE = ("/health", "/live", "/version", "/ui")  # load balancers ask them; a page can ask for a token once it is there
_FREE_FOLDER = "/ui/"
_OPERATORS = ("/metrics", "/control/")  # and whatever begins like them: the router takes /metrics%0A for /metrics
_DISCARD_S = 5.0


class TokenMiddleware:
    """Refuses a request, or passes it on with its caller (`caller_of`)."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in _FREE and not path.startswith(_FREE_FOLDER):
            request = Request(scope, receive)
            wanted = TokenScope.ADMIN if path.startswith(_OPERATORS) else TokenScope.GENERATE
            request.state.look_up = partial(self._tokens.caller, _authorization(request), wanted)
            try:
                request.state.caller = request.state.look_up()
            except Refusal as refusal:
                await _discard_body(request)
                await _answer(refusal, scope, receive, send)
                return
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Whose token it has."""
    caller: Caller = request.state.caller
    return caller


def check_again(request: Request) -> None:
    """For answers that go on for long. Raises Refusal where the token was revoked meanwhile."""
    request.state.look_up()


def _authorization(request: Request) -> str | None:
    """As OpenAI's clients send it, or as Anthropic's do."""
    api_key = request.headers.get("x-api-key")
    return request.headers.get("authorization", f"Bearer {api_key}" if api_key else None)


async def _discard_body(request: Request) -> None:
    """A connection that is closed with unread bytes takes the answer with it."""
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DISCARD_S):
            async for _ in request.stream():
                pass


async def _answer(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    problem = problem_of(refusal)
    if refusal.code is grpc.StatusCode.UNAUTHENTICATED:
        problem.headers["www-authenticate"] = "Bearer"
    await problem_response(problem)(scope, receive, send)
