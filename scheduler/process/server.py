"""The scheduler's gRPC server: translates and delegates."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from checkpoint.token_table import TokenTable
from checkpoint.tokenizer import load_tokenizer
from childproc.wires import listen
from echelon.pb import process_pb2, scheduler_pb2, scheduler_pb2_grpc
from scheduler.config import ConfigError, SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.process.outbox import Outbox
from scheduler.process.recorder import RecorderBusyError
from scheduler.process.replica import Replica

logger = logging.getLogger(__name__)

_MOST_OTHER_BYTES = 1 << 20  # of a Submit, apart from its prompt
_MAX_TOKEN_ID_BYTES = 5
_SERVICE_NAME = "echelon.v1.Scheduler"
_MAX_TRACE_S = 86400.0  # a timer of the loop; NaN would break the order of all others

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[scheduler_pb2.SchedulerRequest, scheduler_pb2.SchedulerReplies]
    TraceContext = grpc.aio.ServicerContext[scheduler_pb2.TraceRequest, scheduler_pb2.TraceEvent]


def _options(max_model_len: int) -> list[tuple[str, int]]:
    # Messages are parsed between rounds, so one that is longer than any prompt would delay every request for nothing.
    # Too long a one breaks the stream of its gateway with all its requests.
    most_bytes = min(_MOST_OTHER_BYTES + _MAX_TOKEN_ID_BYTES * max_model_len, 2**31 - 1)
    return [
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a server that gets half the calls
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", most_bytes),
    ]


class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def Connect(  # type: ignore[override]  # the stub has no word for `context.write`
        self, request_iterator: AsyncIterator[scheduler_pb2.SchedulerRequest], context: "Context"
    ) -> None:
        outbox = Outbox()
        self._replica.connect(outbox)
        writer = asyncio.create_task(self._write(outbox, context))
        try:
            async for request in request_iterator:
                self._handle(request, outbox)
        finally:
            writer.cancel()
            self._replica.drop(outbox)

    def _handle(self, request: scheduler_pb2.SchedulerRequest, outbox: Outbox) -> None:
        """A stream controls its own requests only."""
        match request.WhichOneof("message"):
            case "submit":
                self._replica.submit(request.submit, outbox)
            case "cancel":
                if request.cancel.request_id in outbox.tenants:
                    self._replica.cancel(request.cancel.request_id)
            case "adjust":
                if request.adjust.request_id in outbox.tenants:
                    self._replica.adjust(request.adjust.request_id, request.adjust.speculation)

    async def _write(self, outbox: Outbox, context: "Context") -> None:
        with contextlib.suppress(grpc.aio.AbortError, grpc.aio.InternalError):  # the reader ends with the stream too
            while True:
                await context.write(await outbox.take_all())

    async def GetSchedulerStatus(
        self, request: scheduler_pb2.GetSchedulerStatusRequest, context: object
    ) -> scheduler_pb2.SchedulerStatus:
        return self._replica.status()

    async def Trace(
        self, request: scheduler_pb2.TraceRequest, context: "TraceContext"
    ) -> AsyncIterator[scheduler_pb2.TraceEvent]:
        if not 0 <= request.duration_s <= _MAX_TRACE_S:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"duration_s must be in [0, {_MAX_TRACE_S:g}], got {request.duration_s:g}",
            )
        recorder = self._replica.recorder
        try:
            recording = recorder.start(max_rounds=request.num_rounds, has_spans=not request.rounds_only)
        except RecorderBusyError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        await context.send_initial_metadata(())  # the recording has begun, though there may be no event for a while
        if request.duration_s:
            asyncio.get_running_loop().call_later(request.duration_s, recording.close)
        try:
            async for event in recording:
                yield event
        finally:
            recorder.stop(recording)


class SchedulerServer:
    """A scheduler process's life: connect, serve, drain."""

    def __init__(self, spec: process_pb2.SchedulerSpec) -> None:
        table = TokenTable(load_tokenizer(Path(spec.tokenizer_dir)))
        self._spec = spec
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(options=_options(spec.scheduler.max_model_len))
        core = SchedulerCore(SchedulerConfig.from_spec(spec), table)
        self.replica = Replica(core, spec, on_ready=self._set_health, on_failure=self._fail)
        self._tasks: set[asyncio.Task[None]] = set()
        # Set when a part of the scheduler has died of an error: its state can no longer be trusted.
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, connect_timeout_s: float) -> str:
        """Connect to the groups and listen. Returns "host:port". Raises ConfigError if that fails."""
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(SchedulerService(self.replica), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"{self._spec.host}:{self._spec.port}"
        try:
            port = listen(self._server, address, self._spec.identity)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: is the port taken? ({error})") from error
        self._set_health(False)
        self._spawn(self.replica.target.run())
        if self.replica.draft is not None:
            self._spawn(self.replica.draft.run())
        await self._wait_for_groups(connect_timeout_s)
        await self._server.start()
        return f"{self._spec.host}:{port}"

    async def _wait_for_groups(self, timeout_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        target = self.replica.target
        while not self.replica.ready:
            if asyncio.get_running_loop().time() > deadline:
                where = self._spec.target.address
                raise ConfigError(f"{target.name} at {where} did not answer in {timeout_s:g} s: {target.last_error}")
            await asyncio.sleep(0.02)
        if self.replica.draft is not None:
            await self.replica.draft.attempted.wait()

    async def stop(self, grace_s: float) -> None:
        """Finish the running requests within `grace_s`, then close."""
        await self.replica.drain(grace_s)
        await self._server.stop(1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _set_health(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", _SERVICE_NAME):
            self._spawn(self._health.set(name, status))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._fail(task.exception())

    def _fail(self, error: BaseException | None) -> None:
        if error is not None and not self.failure.done():
            self.failure.set_exception(error)
