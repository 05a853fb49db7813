"""The paths where text is generated, in any API."""

import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from echelon.pb.reading_pb2 import Reading
from gateway.access.caller import Caller
from gateway.core import Core, Replies
from gateway.doors.events import Event
from gateway.doors.http_access import caller_of
from gateway.doors.http_errors import HttpProblem, problem_of, problem_response
from gateway.doors.http_exchange import BodyReader, Call, call_of, in_time, unless_client_leaves
from gateway.doors.http_reply import HttpReply
from gateway.requests.forms import Form
from gateway.requests.refusal import Refusal

logger = logging.getLogger(__name__)


class Answer(Protocol):
    """To one request. Both raise Refusal."""

    async def whole(self, replies: Replies) -> str: ...

    def events(self, replies: Replies) -> AsyncIterator[Event]: ...


class Api(Protocol):
    """How an API reads and answers."""

    @property
    def form(self) -> Form:
        """Of what `prepare` returns."""

    def prepare(self, data: bytes, caller: Caller) -> bytes:
        """A body with what the reader of requests must know besides."""

    def answer(self, reading: Reading, call: Call, caller: Caller) -> Answer: ...

    def error_body(self, problem: HttpProblem) -> dict[str, Any]: ...

    def error_event(self, problem: HttpProblem) -> Event: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateEndpoint:
    """An ASGI application. A client that leaves cancels what runs for it."""

    core: Core
    api: Api
    bodies: BodyReader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, reply = Request(scope, receive), HttpReply(scope, receive, send)
        try:
            call = call_of(request, arrived_s=self.core.now())
            reply.headers["x-request-id"] = call.request_id
            data = await self.bodies.read(request)
            await unless_client_leaves(self._answer(call, caller_of(request), data, reply), receive)
        except ClientDisconnect:
            logger.debug("a client left while it sent a request")
        except Refusal as refusal:
            await self._fail(reply, problem_of(refusal))
        except HttpProblem as problem:
            await self._fail(reply, problem)

    async def _fail(self, reply: HttpReply, problem: HttpProblem) -> None:
        await reply.fail(problem_response(problem, self.api.error_body(problem)), self.api.error_event(problem))

    async def _answer(self, call: Call, caller: Caller, data: bytes, reply: HttpReply) -> None:
        prepared = self.api.prepare(data, caller)
        reading = await in_time(self.core.read(self.api.form, prepared), call.timeout_s)
        if reading.presentation.ignored_fields:
            reply.headers["x-ignored-fields"] = ", ".join(reading.presentation.ignored_fields)
        self._name(reading, call.request_id)
        answer = self.api.answer(reading, call, caller)
        remaining_s = call.remaining_s(self.core.now())
        run = self.core.run(reading.submits, caller, arrived_s=call.arrived_s, remaining_s=remaining_s)
        async with run as replies:
            if reading.presentation.stream:
                await reply.stream(answer.events(replies))
            else:
                await reply.json(await answer.whole(replies))

    def _name(self, reading: Reading, request_id: str) -> None:
        """Clients may give many requests one id; a scheduler may not have two of the same."""
        for number, submit in enumerate(reading.submits):
            submit.request_id = request_id if len(reading.submits) == 1 else f"{request_id}-{number}"
            if self.core.is_running(submit.request_id):
                submit.request_id += f"-{secrets.token_hex(4)}"
