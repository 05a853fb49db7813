"""The gateway's HTTP server: /metrics, for Prometheus."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from gateway.doors.listening import listen

logger = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 16 << 10
_LIMIT_S = 10.0  # for a request to arrive, and for its answer to be read
_MAX_CONNECTIONS = 128


class HttpServer:
    """Listens once constructed and answers after `start`, on the event loop: rendering takes a few milliseconds, and
    threads of its own would hold up the loop for longer. One request a connection.

    If too many are open, the oldest is dropped, so that silent connections shut nobody out. Raises OSError
    where the port cannot be had.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, *, refresh: Callable[[], Awaitable[None]]):
        """`refresh` is awaited before each scrape."""
        self._socket: socket.socket = listen(host, port)
        self._registry = registry
        self._refresh = refresh
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # the oldest first

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, sock=self._socket, limit=_MAX_HEAD_BYTES)

    async def stop(self) -> None:
        """Returns once nothing is open."""
        if self._server is None:
            self._socket.close()
        else:
            self._server.close()
        serving = list(self._open)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio serves a connection in a task"
        self._open[task] = writer
        if len(self._open) > _MAX_CONNECTIONS:
            next(iter(self._open)).cancel()
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(_LIMIT_S):
                    writer.write(await self._answer(reader))
                    await writer.drain()
                    writer.write_eof()
                    await reader.read()  # until the client has closed: unread bytes would make a reset of our answer
        except asyncio.CancelledError:
            logger.debug("dropped a connection")
        finally:
            del self._open[task]
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large", "text/plain", b"the request is too long\n")
        request, _, fields = head.partition("\r\n")
        method, _, rest = request.partition(" ")
        if rest.split(" ")[0].split("?")[0] != "/metrics":
            return _response("404 Not Found", "text/plain", b"there is only /metrics\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"/metrics is only read\n")
        await self._refresh()
        encode, content_type = choose_encoder(_accepted(fields))
        answer = _response("200 OK", content_type, encode(self._registry))
        return answer if method == "GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _accepted(fields: str) -> str:
    """The value of the field Accept; empty without one."""
    for line in fields.split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "accept":
            return value.strip()
    return ""


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
