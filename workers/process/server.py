"""The leader's gRPC server: streams of rounds in, results out, on an event loop in a thread of its own."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from childproc.wires import listen
from echelon.pb.process_pb2 import ProcessIdentity
from echelon.pb.worker_pb2 import (
    DiskContents,
    EngineRole,
    GetWorkerInfoRequest,
    Hello,
    MoveOrder,
    MoveResult,
    Round,
    RoundReply,
    RoundRequest,
    RoundResult,
    WireLimit,
    WorkerInfo,
)
from echelon.pb.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from workers.process.run_loop import Arrived, Opened, Ordered, Work

logger = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.so_reuseport", 0),  # fail if the port is taken
    ("grpc.max_receive_message_length", WireLimit.WIRE_LIMIT_MESSAGE_BYTES),
    ("grpc.max_send_message_length", WireLimit.WIRE_LIMIT_MESSAGE_BYTES),
]
_MAX_PENDING_ROUNDS = 64  # per stream; a scheduler has at most three in flight
_MAX_PENDING_MOVES = 1024  # per stream
_FAIL_GRACE_S = 1.0  # for open streams to end with the reason of a failure; not measured
_SERVICE_NAME = "echelon.v1.Worker"
_HEALTH_NAMES = {EngineRole.ENGINE_ROLE_TARGET: "target", EngineRole.ENGINE_ROLE_DRAFT: "draft"}

T = TypeVar("T")
Silence = Callable[[], tuple[int, float]]
if TYPE_CHECKING:
    RoundsContext = grpc.aio.ServicerContext[RoundRequest, RoundReply]
    InfoContext = grpc.aio.ServicerContext[GetWorkerInfoRequest, WorkerInfo]


@dataclass(frozen=True, slots=True)
class Ending:
    """The status of a stream that this side ends."""

    code: grpc.StatusCode
    message: str


class RoundStream:
    """See workers.process.run_loop.Session. State that is not thread-safe belongs to the event loop."""

    def __init__(self, hello: Hello) -> None:
        self.role: EngineRole.ValueType = hello.role
        self.incarnation = hello.incarnation
        self.is_open = True
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[RoundReply | Ending | None] = asyncio.Queue()
        self._rounds = _Pending("round", _MAX_PENDING_ROUNDS)
        self._moves = _Pending("move", _MAX_PENDING_MOVES)
        self._half_closed = False

    def deliver(self, result: RoundResult) -> None:
        self._loop.call_soon_threadsafe(self._on_result, result)

    def deliver_move(self, result: MoveResult) -> None:
        self._loop.call_soon_threadsafe(self._on_moved, result)

    def deliver_disk(self, contents: DiskContents) -> None:
        self._loop.call_soon_threadsafe(self._answers.put_nowait, RoundReply(disk=contents))

    def reject(self, error: str) -> None:
        self.end(Ending(grpc.StatusCode.INVALID_ARGUMENT, error))

    def end(self, ending: Ending) -> None:
        """Thread-safe. Answers in flight are still sent first."""
        self.is_open = False
        self._loop.call_soon_threadsafe(self._answers.put_nowait, ending)

    def accept(self, round_: Round) -> bool:
        """Whether an arriving round may be queued; if not, the stream ends."""
        return self._accept(self._rounds, round_.round_id, round_.incarnation)

    def accept_move(self, order: MoveOrder) -> bool:
        """Whether an arriving order may be queued; if not, the stream ends."""
        return self._accept(self._moves, order.move_id, order.incarnation)

    def half_close(self) -> None:
        """No more rounds will come; the stream ends after the last answer."""
        self._half_closed = True
        self._end_if_done()

    async def next_answer(self) -> RoundReply | Ending | None:
        return await self._answers.get()

    def _accept(self, pending: "_Pending", message_id: int, incarnation: int) -> bool:
        if not self.is_open:
            return False
        if incarnation != self.incarnation:
            where = f"{pending.kind} {message_id}: incarnation:"
            error: str | None = f"{where} {incarnation}, but the stream's hello said {self.incarnation}"
        else:
            error = pending.begin(message_id)
        if error is not None:
            self.reject(error)
        return error is None

    def _on_result(self, result: RoundResult) -> None:
        self._rounds.num -= 1
        self._answers.put_nowait(RoundReply(result=result))
        self._end_if_done()

    def _on_moved(self, result: MoveResult) -> None:
        self._moves.num -= 1
        self._answers.put_nowait(RoundReply(move=result))
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._half_closed and self._rounds.num == self._moves.num == 0:
            self._answers.put_nowait(None)


class _Pending:
    """The rounds, or moves, of a stream that are not answered yet."""

    def __init__(self, kind: str, limit: int) -> None:
        self.kind = kind
        self.num = 0
        self._limit = limit
        self._last_id = -1

    def begin(self, message_id: int) -> str | None:
        """What is wrong with another one; None if it may begin."""
        if message_id <= self._last_id:
            return f"{self.kind} {message_id}: {self.kind}_id: must be above {self._last_id}"
        if self.num >= self._limit:
            return f"{self.kind} {message_id}: {self._limit} {self.kind}s of this stream are waiting already"
        self._last_id = message_id
        self.num += 1
        return None


class Servicer(WorkerServicer):
    """Translates between streams and the run loop."""

    def __init__(self, info: WorkerInfo, silence: Silence, submit: Callable[[Work], None]) -> None:
        self._info = info
        self._silence = silence
        self._submit = submit
        self._streams: dict[EngineRole.ValueType, RoundStream] = {}

    async def Rounds(
        self, request_iterator: AsyncIterator[RoundRequest], context: "RoundsContext"
    ) -> AsyncIterator[RoundReply]:
        stream = await self._open(request_iterator, context)
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            while (answer := await stream.next_answer()) is not None:
                if isinstance(answer, Ending):
                    await context.abort(answer.code, answer.message)
                yield answer
        finally:
            stream.is_open = False
            reader.cancel()

    async def GetWorkerInfo(self, request: GetWorkerInfoRequest, context: "InfoContext") -> WorkerInfo:
        rank, silent_s = self._silence()
        info = WorkerInfo(silent_rank=rank, silent_s=silent_s)
        info.MergeFrom(self._info)
        return info

    def end_all(self, ending: Ending) -> None:
        for stream in self._streams.values():
            stream.end(ending)

    async def _open(self, requests: AsyncIterator[RoundRequest], context: "RoundsContext") -> RoundStream:
        """The stream that the first message asks for."""
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello: must be the first message of a stream")
        assert first is not None, "abort has raised"
        if error := self._objection(first.hello):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error)
        stream = RoundStream(first.hello)
        previous = self._streams.get(stream.role)
        if previous is not None and previous.is_open:
            previous.end(Ending(grpc.StatusCode.ABORTED, "a newer stream took over this engine"))
        self._streams[stream.role] = stream
        self._submit(Opened(stream))
        return stream

    def _objection(self, hello: Hello) -> str:
        if hello.version != self._info.version:
            return f"version: the scheduler runs Echelon {hello.version}, the worker {self._info.version}"
        if hello.incarnation != self._info.incarnation:
            return (
                f"incarnation: the scheduler expects {hello.incarnation}, the worker group is {self._info.incarnation}"
            )
        roles = [engine.role for engine in self._info.engines]
        if hello.role not in roles:
            return f"role: {hello.role} is not hosted here, only {', '.join(map(EngineRole.Name, roles))}"
        return ""

    async def _read(self, requests: AsyncIterator[RoundRequest], stream: RoundStream) -> None:
        async for request in requests:
            if request.HasField("round"):
                if not stream.accept(request.round):
                    return
                self._submit(Arrived(stream, request.round, time.monotonic_ns()))
            elif request.HasField("move"):
                if not stream.accept_move(request.move):
                    return
                self._submit(Ordered(stream, request.move))
            else:
                stream.reject("round: only rounds and move orders may follow the hello")
                return
        stream.half_close()


class ServerThread:
    """Serves from `start` to `stop`. Call the methods from other threads than its own; they block."""

    def __init__(
        self, info: WorkerInfo, silence: Silence, submit: Callable[[Work], None], identity: ProcessIdentity
    ) -> None:
        """`silence`: see round_channel.Leader."""
        self._identity = identity
        self._info = info
        self._servicer = Servicer(info, silence, submit)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # made when the package is imported
        self._loop = asyncio.new_event_loop()
        self._server: grpc.aio.Server | None = None

    def start(self, host: str) -> str:
        """Serves on a free port of `host`; returns host:port."""
        threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True).start()
        return self._call(self._start(host)).result()

    def fail(self, error: str) -> None:
        """The group is broken: tell all listeners, then stop. Raises nothing: a worse error is already known."""
        try:
            self._call(self._fail(error)).result(timeout=2 * _FAIL_GRACE_S)
        except Exception:  # as the docstring says
            logger.exception("could not tell the streams that the group is broken")

    def stop(self, grace_s: float) -> None:
        self._call(self._stop(grace_s)).result()

    def _call(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _start(self, host: str) -> str:
        self._server = grpc.aio.server(options=_OPTIONS)
        add_WorkerServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        port = listen(self._server, f"{host}:0", self._identity)
        await self._server.start()
        for service in self._health_services():
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    async def _fail(self, error: str) -> None:
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()  # NOT_SERVING everywhere
        self._servicer.end_all(Ending(grpc.StatusCode.UNAVAILABLE, error))
        await self._server.stop(_FAIL_GRACE_S)

    async def _stop(self, grace_s: float) -> None:
        assert self._server is not None, "started"
        await self._health.enter_graceful_shutdown()
        self._servicer.end_all(Ending(grpc.StatusCode.UNAVAILABLE, "the worker group is stopping"))
        await self._server.stop(grace_s)

    def _health_services(self) -> Iterable[str]:
        return ["", _SERVICE_NAME, *(_HEALTH_NAMES[engine.role] for engine in self._info.engines)]
