"""The gateway's HTTP server: uvicorn on the gateway's own event loop, with limits on what a client can hold."""

import asyncio
import contextlib
import functools
import math
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.access.tls_files import TlsFiles
from gateway.doors.http_errors import HttpProblem, answer_too_many, problem_response
from gateway.doors.listening import listen
from gateway.doors.turns import Turns

MAX_CONNECTIONS = 4096
_ACCEPTED_AT_ONCE, _MAX_WAITING_CONNECTIONS = 16, 2048
_MAX_HEAD_BYTES = 16 << 10
_HEAD_S = 10.0  # for a request's head to arrive, and for a TLS handshake
_LOOK_AGAIN_S = 2.0  # for a new certificate
_KEEP_ALIVE_S = 75  # between two requests; longer than clients keep a connection, so that they rarely meet a closed one
_UNREAD_S = 60.0  # a client that takes nothing of an answer for so long is dropped
_VANISHED_S = 30  # a client whose machine has gone; as on the gRPC port


class HttpServer:
    """Listens once constructed and answers after `start`.

    If too many connections are open, the one that has been without a request for the longest time is dropped, so that
    silent connections shut nobody out. Raises OSError where the port cannot be had. With `tls`, it speaks HTTPS only.
    """

    def __init__(self, host: str, port: int, app: ASGIApp, tls: TlsFiles | None = None) -> None:
        self._socket = listen(host, port)
        _notice_vanished_clients(self._socket)
        self._guard = _Guard(max_connections=_affordable_connections())
        self._server = _Server(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", functools.partial(_Connection, self._guard)),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # mistakes of clients are not worth a line
                access_log=False,
                date_header=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                backlog=_ACCEPTED_AT_ONCE,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            ),
            tls,
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self, grace_s: float) -> None:
        """Takes no new connections, lets answers end within `grace_s`, and returns once nothing is open."""
        if self._serving is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.stopping.set()
        await self._serving
        await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)
        self._guard.drop_all()


class _Server(uvicorn.Server):
    """Stops when told to by `stopping`; signals are the process's own affair."""

    def __init__(self, config: uvicorn.Config, tls: TlsFiles | None) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()
        self._tls = tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Instead of uvicorn's, which gives a TLS handshake a minute, and keeps a certificate for ever."""
        assert sockets, "bound before"
        await self.lifespan.startup()
        self.servers = []
        await self._listen(sockets[0])
        self.started = True

    async def main_loop(self) -> None:
        identity = self._tls and self._tls.identity()
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), None if self._tls is None else _LOOK_AGAIN_S)
            if self._tls and self._tls.identity() is not identity:
                identity = self._tls.identity()
                await self._listen(self.servers[0].sockets[0].dup())

    async def _listen(self, listening: socket.socket) -> None:
        """From now on only with the newest certificate; connections that are open stay."""
        before, loop = self.servers, asyncio.get_running_loop()
        tls = None if self._tls is None else self._tls.identity().context
        server = await loop.create_server(
            self._connection,
            sock=listening,
            ssl=tls,
            ssl_handshake_timeout=_HEAD_S if tls else None,
            backlog=_ACCEPTED_AT_ONCE,
        )
        # The event loop accepts as many in one go as its backlog; more than these may wait.
        listening.listen(_MAX_WAITING_CONNECTIONS)
        self.servers = [server]
        for old in before:
            old.close()

    def _connection(self) -> asyncio.Protocol:
        protocol = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


class _Guard:
    """The open connections of one server."""

    def __init__(self, *, max_connections: int) -> None:
        self.turns = Turns()
        self._max_connections = max_connections
        self._open: dict[_Connection, None] = {}  # the one that was last given a request is the last

    def admit(self, connection: "_Connection") -> bool:
        """False: there are too many already, and all of them have requests."""
        self._open[connection] = None
        if len(self._open) <= self._max_connections:
            return True
        idle = next(other for other in self._open if other.is_idle)  # the new one, if there is no other
        if idle is connection:
            return False
        idle.drop()
        return True

    def renew(self, connection: "_Connection") -> None:
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def remove(self, connection: "_Connection") -> None:
        self._open.pop(connection, None)

    def drop_all(self) -> None:
        for connection in list(self._open):
            connection.drop()


class _Connection(H11Protocol):
    """uvicorn's connection, which by itself waits for ever for a head to arrive and for an answer to be read."""

    def __init__(self, guard: _Guard, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._guard = guard
        self._head_limit: asyncio.TimerHandle | None = None
        self._unread_limit: asyncio.TimerHandle | None = None
        self._refused = False  # what it sends is no HTTP; it has been told so

    @property
    def is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def drop(self) -> None:
        self._guard.remove(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._guard.admit(self):
            self.app = answer_too_many
        self._head_limit = self.loop.call_later(_HEAD_S, self.drop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.remove(self)
        for limit in (self._head_limit, self._unread_limit):
            if limit is not None:
                limit.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._guard.turns.take(lambda: self._read(data)):
            self.transport.pause_reading()

    def _read(self, data: bytes) -> None:
        if not (self.flow.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()
        for start in range(0, len(data), _MAX_HEAD_BYTES):  # of a head that comes as a whole, h11 limits nothing
            if self._refused or self.transport.is_closing():
                return
            super().data_received(data[start : start + _MAX_HEAD_BYTES])
        if self.is_idle and not self.transport.is_closing():
            self._head_limit = self._head_limit or self.loop.call_later(_HEAD_S, self.drop)
        elif self._head_limit is not None:
            self._head_limit.cancel()
            self._head_limit = None

    def send_400_response(self, msg: str) -> None:
        """Closes later, because a connection that is closed with unread bytes takes the answer with it."""
        if not self.is_idle or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.drop()
            return
        self._refused = True
        words = f"this is no HTTP/1.1 request, or its head has more than {_MAX_HEAD_BYTES} bytes"
        answer = problem_response(HttpProblem(400, words, {"connection": "close"}))
        head = h11.Response(status_code=400, headers=answer.raw_headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:  # TLS
            self.transport.close()

    def on_response_complete(self) -> None:
        self._guard.renew(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_limit = self.loop.call_later(_UNREAD_S, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_limit is not None:
            self._unread_limit.cancel()
            self._unread_limit = None


def _affordable_connections() -> int:
    """Half of the files that this process may open are for others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _notice_vanished_clients(listening: socket.socket) -> None:
    """For the connections that it accepts: they inherit these options."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _VANISHED_S // 3)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _VANISHED_S // 3)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
