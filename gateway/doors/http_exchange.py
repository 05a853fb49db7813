"""A request over HTTP that takes its time: what its head says, its body, and whether its client is still there."""

import asyncio
import io
import math
import re
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from starlette.requests import Request
from starlette.types import Receive

from gateway.doors.http_errors import HttpProblem
from gateway.requests.refusal import Refusal, invalid, shown

T = TypeVar("T")

_BODY_S = 60.0  # for a body to arrive
_MAX_HELD_BYTES = 256 << 20
# A body that is somewhat too large is received nevertheless: a connection that is closed with unread bytes takes the
# answer with it.
_PATIENCE = 2
_REQUEST_ID = re.compile(r"[!-~]{1,100}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the head of a request says."""

    request_id: str
    arrived_s: float
    timeout_s: float | None

    def remaining_s(self, now_s: float) -> float | None:
        """Until the deadline. Raises Refusal when it has passed."""
        if self.timeout_s is None:
            return None
        remaining_s = self.timeout_s - (now_s - self.arrived_s)
        if remaining_s <= 0:
            raise _too_late(self.timeout_s)
        return remaining_s


def call_of(request: Request, *, arrived_s: float) -> Call:
    """Raises Refusal."""
    return Call(request_id=_request_id(request), arrived_s=arrived_s, timeout_s=_timeout_s(request))


class BodyReader:
    """Receives the bodies of requests, each of at most `max_bytes`, and all together of a few hundred MiB at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_held = 0  # bytes of those that are not complete

    async def read(self, request: Request) -> bytes:
        """Raises HttpProblem, and Starlette's ClientDisconnect."""
        _check_content_type(request)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > _PATIENCE * self._max_bytes:
            raise self._too_large()
        body = io.BytesIO()  # hands out what it holds without a copy, which takes milliseconds for a large body
        try:
            async with asyncio.timeout(_BODY_S):
                await self._receive(request, body)
        except TimeoutError as err:
            raise HttpProblem(408, f"request: its body did not arrive within {_BODY_S:g} s") from err
        finally:
            self._num_held -= body.tell()
        return body.getvalue()

    async def _receive(self, request: Request, body: io.BytesIO) -> None:
        num_bytes = 0
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > _PATIENCE * self._max_bytes:
                break
            if num_bytes <= self._max_bytes:
                body.write(piece)
                self._num_held += len(piece)
            if self._num_held > _MAX_HELD_BYTES:
                raise HttpProblem(429, "request: too many large requests arrive at once; try again later")
        if num_bytes > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> HttpProblem:
        return HttpProblem(413, f"request: must have at most {self._max_bytes} bytes; send a shorter one")


async def in_time(work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
    """Raises Refusal when the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as err:
        raise _too_late(timeout_s or 0.0) from err


async def unless_client_leaves(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Cancels `work` when the client has gone. The request's body must have been received."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_leave(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request) -> None:
    """A page of another site can make a browser send anything but JSON, without asking us."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise HttpProblem(415, f"content-type: must be application/json, got {shown(given)}")


def _request_id(request: Request) -> str:
    """The client's, or a new one."""
    given = request.headers.get("x-request-id")
    if given is None:
        return secrets.token_hex(12)
    if not _REQUEST_ID.fullmatch(given):
        raise invalid(f"x-request-id: must be 1 to 100 printable ASCII characters, got {shown(given)}")
    return given


def _timeout_s(request: Request) -> float | None:
    """How long the client would wait."""
    given = request.headers.get("x-request-timeout")
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise invalid(f"x-request-timeout: must be a number of seconds > 0, got {shown(given)}")
    return timeout_s


def _too_late(timeout_s: float) -> Refusal:
    return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, f"not finished within {timeout_s:.3f} s")
