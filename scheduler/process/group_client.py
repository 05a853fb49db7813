"""The stream of rounds to one engine of a worker group, reopened when it breaks."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, TypeAlias, cast

import grpc
import grpc.aio

from childproc.wires import open_channel
from echelon.pb import process_pb2, worker_pb2, worker_pb2_grpc
from scheduler.errors import UnexpectedAnswerError

logger = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = worker_pb2.WIRE_LIMIT_MESSAGE_BYTES
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
]
# None of these times is measured.
_FIRST_BACKOFF_S = 0.1  # until the first attempt to connect again, then doubled each time ...
_MAX_BACKOFF_S = 5.0  # ... up to this
_INFO_TIMEOUT_S = 5.0  # for the leader to say what its group is
_SECOND_LOOK_S = 1.0  # to read an answer that came while this process stalled
_CALL_ON_IDLE_S = 2.0  # how often an idle group is asked whether it is there
_RANK_PATIENCE_S = 5.0  # a rank that has not answered its leader for so long counts as a group that does not answer
_IDLE_PATIENCE_S = 15.0  # an idle group that has not answered for so long counts as lost
_SIZES = ("vocab_size", "num_blocks", "block_size", "num_slots", "max_model_len", "max_num_batched_tokens")

if TYPE_CHECKING:
    RoundsCall = grpc.aio.StreamStreamCall[worker_pb2.RoundRequest, worker_pb2.RoundReply]
    Answers = AsyncIterator[worker_pb2.RoundReply]


Role: TypeAlias = "worker_pb2.EngineRole.ValueType"


class GroupError(RuntimeError):
    """The group answers, but it is not the expected one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEvents:
    """Callbacks of a client, on the event loop."""

    connected: Callable[[worker_pb2.EngineInfo, int], None]  # engine, incarnation
    result: Callable[[worker_pb2.RoundResult], None]
    lost: Callable[[str], None]  # reason, for a person; after `connected` only
    moved: Callable[[worker_pb2.MoveResult], None] = lambda result: None
    disk: Callable[[worker_pb2.DiskContents], None] = lambda contents: None  # the last message says so
    patience_s: Callable[[], float] = lambda: inf  # how long the oldest round in flight may take


class GroupClient:
    """Sends rounds to the leader of a group and reports their results.

    The group counts as lost when a round is not answered within its patience or within `round_timeout_s` (0: no limit
    at all). A group is connected once it has answered a round without rows; one that still hangs in its last request
    is not. `name` is what error messages call it.
    """

    def __init__(
        self,
        name: str,
        endpoint: process_pb2.GroupEndpoint,
        role: Role,
        *,
        version: str,
        round_timeout_s: float,
        events: GroupEvents,
        identity: process_pb2.ProcessIdentity | None = None,
    ) -> None:
        self._identity = identity
        self.name = name
        self.attempted = asyncio.Event()  # the first attempt to connect has ended, successfully or not
        self.last_error = ""
        self.silent_since: float | None = None  # on the loop's clock: since when an idle group has not answered
        self._endpoint = endpoint
        self._role = role
        self._version = version
        self._round_timeout_s = round_timeout_s
        self._events = events
        self._outgoing: asyncio.Queue[worker_pb2.RoundRequest] = asyncio.Queue()
        self._last_sent = worker_pb2.RoundRequest()
        self._early: list[worker_pb2.DiskContents] = []  # that came before the first round was answered
        self._num_in_flight = 0
        self._watchdog: asyncio.TimerHandle | None = None
        self._timed_out_s: float | None = None  # how long the client waited for the round that never came back
        self.was_taken_over = False  # the last stream was lost because another scheduler opened one
        self._was_connected = False
        self._serving: asyncio.Task[None] | None = None
        self._redirected = asyncio.Event()

    def redirect(self, endpoint: process_pb2.GroupEndpoint) -> None:
        """The group was started again: leave the old one, which may hang, and connect to the new one at once."""
        if endpoint == self._endpoint:
            return
        self._endpoint = endpoint
        self._redirected.set()
        if self._serving is not None:
            self._serving.cancel()

    def send(self, message: worker_pb2.Round) -> None:
        """Queue a round. Only between `connected` and `lost`."""
        self._outgoing.put_nowait(worker_pb2.RoundRequest(round=message))
        self._num_in_flight += 1

    def send_move(self, order: worker_pb2.MoveOrder) -> None:
        """Queue a move after the rounds so far. Only between `connected` and `lost`. Nobody waits for the answer."""
        self._outgoing.put_nowait(worker_pb2.RoundRequest(move=order))

    async def run(self) -> None:
        """Stay connected until cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            self._redirected.clear()
            await self._serve_until_redirected()
            self.attempted.set()
            backoff_s = _FIRST_BACKOFF_S if self._was_connected else min(2 * backoff_s, _MAX_BACKOFF_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._redirected.wait(), backoff_s)
                backoff_s = _FIRST_BACKOFF_S

    async def _serve_until_redirected(self) -> None:
        """Until the stream ends, one way or another."""
        self._serving = asyncio.create_task(self._serve_once())
        try:
            await asyncio.wait({self._serving})
        except asyncio.CancelledError:
            self._serving.cancel()
            await asyncio.wait({self._serving})
            raise
        if self._serving.cancelled():
            return
        error = self._serving.exception()
        if not isinstance(error, (grpc.aio.AioRpcError, GroupError)):
            self._serving.result()
            return
        reason = _describe(error)
        if reason != self.last_error:
            logger.warning("%s at %s: %s", self.name, self._endpoint.address, reason)
        self.last_error = reason

    async def _serve_once(self) -> None:
        self._was_connected = False
        async with open_channel(self._endpoint.address, *_CHANNEL_OPTIONS, identity=self._identity) as channel:
            stub = cast("worker_pb2_grpc.WorkerAsyncStub", worker_pb2_grpc.WorkerStub(channel))
            info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=_INFO_TIMEOUT_S)
            engine = self._check(info)
            call = stub.Rounds()  # type: ignore[call-arg]  # written to below, not fed from an iterator
            hello = worker_pb2.Hello(role=self._role, incarnation=info.incarnation, version=self._version)
            await write_if_open(call, worker_pb2.RoundRequest(hello=hello))
            answers = aiter(call)
            await self._probe(call, answers, info.incarnation)
            self._start(engine, info.incarnation)
            tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._call_on_idle(stub, call))]
            try:
                await self._read(call, answers)
            finally:
                for task in tasks:
                    task.cancel()
                self._stop()

    async def _probe(self, call: "RoundsCall", answers: "Answers", incarnation: int) -> None:
        """Wait until the group has done a round."""
        await write_if_open(call, worker_pb2.RoundRequest(round=worker_pb2.Round(incarnation=incarnation)))
        try:
            if not await asyncio.wait_for(self._first_result(answers), self._round_timeout_s or None):
                raise GroupError(f"ended the stream: {await call.details() or 'no reason given'}")
        except TimeoutError as error:
            raise GroupError("does not answer") from error

    async def _first_result(self, answers: "Answers") -> bool:
        """Whether a round is answered before the stream ends."""
        self._early = []
        while (reply := await anext(answers, None)) is not None:
            if reply.HasField("result"):
                return True
            self._early.append(reply.disk)
        return False

    def _check(self, info: worker_pb2.WorkerInfo) -> worker_pb2.EngineInfo:
        if self._version and info.version != self._version:
            raise GroupError(f"runs version {info.version}, this scheduler is {self._version}")
        if self._endpoint.incarnation and info.incarnation != self._endpoint.incarnation:
            raise GroupError(f"is incarnation {info.incarnation}, expected {self._endpoint.incarnation}")
        if info.silent_s >= _RANK_PATIENCE_S:
            raise GroupError(f"rank {info.silent_rank} does not answer")
        for engine in info.engines:
            if engine.role == self._role:
                if missing := [field for field in _SIZES if getattr(engine, field) < 1]:
                    raise GroupError(f"says nothing of its {', '.join(missing)}")
                return engine
        raise GroupError(f"hosts no {worker_pb2.EngineRole.Name(self._role)} engine")

    def _start(self, engine: worker_pb2.EngineInfo, incarnation: int) -> None:
        self._outgoing = asyncio.Queue()
        self._num_in_flight = 0
        self._timed_out_s = None
        self._was_connected = True
        self.last_error = ""
        logger.info("%s at %s: connected, incarnation %d", self.name, self._endpoint.address, incarnation)
        self._events.connected(engine, incarnation)
        for contents in self._early:
            self._events.disk(contents)
        self.attempted.set()

    def _stop(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None  # it belongs to the old stream's first round
        self.silent_since = None

    async def _write(self, call: "RoundsCall") -> None:
        while True:
            message = await self._outgoing.get()
            if self._watchdog is None:
                self._arm(call)
            self._last_sent = message
            await write_if_open(call, message)

    async def _call_on_idle(self, stub: "worker_pb2_grpc.WorkerAsyncStub", call: "RoundsCall") -> None:
        """Ask a group that has no round to answer whether it is there. (Otherwise the watchdog looks at the clock.)"""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_CALL_ON_IDLE_S)
            self.silent_since = await self._ask(stub) if self._num_in_flight == 0 else None
            silent_s = 0.0 if self.silent_since is None else now() - self.silent_since
            if silent_s > _IDLE_PATIENCE_S and self._num_in_flight == 0:
                self._give_up(call, silent_s)

    async def _ask(self, stub: "worker_pb2_grpc.WorkerAsyncStub") -> float | None:
        """Since when the leader or another rank has not answered; None if all are there."""
        now = asyncio.get_running_loop().time
        asked = now()
        try:
            info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=_INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return asked if self.silent_since is None else self.silent_since
        return now() - info.silent_s if info.silent_s >= _RANK_PATIENCE_S else None

    async def _read(self, call: "RoundsCall", answers: "Answers") -> None:
        try:
            async for reply in answers:
                self._take_in(reply, call)
            raise GroupError(f"ended the stream: {await call.details() or 'no reason given'}")
        except (grpc.aio.AioRpcError, asyncio.CancelledError, GroupError, UnexpectedAnswerError) as error:
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
            self.was_taken_over = code is grpc.StatusCode.ABORTED
            self._events.lost(self._loss(error))
            if isinstance(error, asyncio.CancelledError) and (self._timed_out_s is None or self._redirected.is_set()):
                raise
            raise GroupError(self._loss(error)) from error

    def _take_in(self, reply: worker_pb2.RoundReply, call: "RoundsCall") -> None:
        if reply.HasField("move"):
            self._events.moved(reply.move)
        elif reply.HasField("disk"):
            self._events.disk(reply.disk)
        else:
            self._num_in_flight -= 1
            self._events.result(reply.result)
            self._arm(call)

    def _loss(self, error: BaseException) -> str:
        if self._redirected.is_set():
            return "it was started again"
        if self._timed_out_s is not None:
            return f"did not answer within {self._timed_out_s:.3g} s"
        if (num_bytes := self._last_sent.ByteSize()) > _MAX_MESSAGE_BYTES:
            return _too_large(f"one of {num_bytes} bytes was to be sent")  # gRPC says only that it failed
        return _describe(error)

    def _arm(self, call: "RoundsCall") -> None:
        """Start to wait for the oldest round in flight."""
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._num_in_flight > 0 and self._round_timeout_s > 0:
            limit_s = min(self._round_timeout_s, self._events.patience_s())
            self._watchdog = asyncio.get_running_loop().call_later(limit_s, self._look_again, call, limit_s)

    def _look_again(self, call: "RoundsCall", limit_s: float) -> None:
        """If this process itself stalled, the answer may have arrived meanwhile and only waits to be read."""
        again_s = min(limit_s, _SECOND_LOOK_S)
        self._watchdog = asyncio.get_running_loop().call_later(again_s, self._give_up, call, limit_s)

    def _give_up(self, call: "RoundsCall", limit_s: float) -> None:
        self._timed_out_s = limit_s
        call.cancel()


async def write_if_open(call: "RoundsCall", message: worker_pb2.RoundRequest) -> None:
    """Nothing if the stream has ended: whoever reads it sees the same end, and says why."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(message)


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
            return _too_large(error.details() or "")
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


def _too_large(detail: str) -> str:
    limit = f"a message of a round has at most {_MAX_MESSAGE_BYTES >> 20} MiB"
    return f"{limit} ({detail}); lower scheduler.max_num_seqs or scheduler.max_model_len"


def group_client(spec: process_pb2.SchedulerSpec, role: Role, events: GroupEvents) -> GroupClient:
    is_target = role == worker_pb2.ENGINE_ROLE_TARGET
    return GroupClient(
        "target group" if is_target else "draft group",
        spec.target if is_target else spec.draft,
        role,
        version=spec.version,
        round_timeout_s=spec.round_timeout_s,
        events=events,
        identity=spec.identity,
    )
