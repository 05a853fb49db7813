"""The gateway's end of a scheduler's multiplexed stream."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import cast

import grpc

from childproc.wires import open_channel
from echelon.pb import inference_pb2, scheduler_pb2, scheduler_pb2_grpc
from gateway.metrics import RequestMeter
from gateway.replicas.mailbox import Mailbox
from gateway.requests.refusal import Refusal, status_code

logger = logging.getLogger(__name__)

_Connection = grpc.aio.StreamStreamCall[scheduler_pb2.SchedulerRequest, scheduler_pb2.SchedulerReplies]

_STATUS_INTERVAL_S = 0.5
STATUS_TIMEOUT_S = 2.0  # with the interval: a scheduler that hangs is seen within 2.5 s
# Unanswered questions in a row, with no reply to any request meanwhile, after which requests are given up: 7 s,
# because on a busy machine a scheduler or this gateway may stall for a while.
_MAX_UNANSWERED = 3
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # from our own scheduler; prompt logprobs can be long
    ("grpc.initial_reconnect_backoff_ms", int(1e3 * MIN_BACKOFF_S)),
    ("grpc.min_reconnect_backoff_ms", int(1e3 * MIN_BACKOFF_S)),
    ("grpc.max_reconnect_backoff_ms", int(1e3 * MAX_BACKOFF_S)),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(slots=True)
class _Running:
    """A request that the scheduler has not ended yet."""

    mailbox: Mailbox | None  # None: nobody waits for the replies any more
    meter: RequestMeter


class SchedulerLink:
    """Keeps one stream to one scheduler open, hands replies to the mailboxes of their requests, and knows whether
    the scheduler would serve a request now.

    A request whose stream breaks, or whose scheduler falls silent, ends with UNAVAILABLE. An abandoned request keeps
    its id until the scheduler has confirmed its end, so that a new request under the same id never receives the old
    one's replies.
    """

    def __init__(self, address: str, *, on_change: Callable[[], None]) -> None:
        self.address = address
        self.ready = False
        self.not_ready_reason = "not connected yet"
        self._on_change = on_change
        self._channel = open_channel(address, *_CHANNEL_OPTIONS)
        # The stubs' declarations know asynchronous methods under another name than the code does.
        self._stub = cast("scheduler_pb2_grpc.SchedulerAsyncStub", scheduler_pb2_grpc.SchedulerStub(self._channel))
        self._outgoing: asyncio.Queue[scheduler_pb2.SchedulerRequest] | None = None  # None: no stream
        self._connection: _Connection | None = None
        self._num_unanswered = 0  # questions for the status since the scheduler was last heard from
        self._running: dict[str, _Running] = {}

    @property
    def num_requests(self) -> int:
        return len(self._running)

    def knows(self, request_id: str) -> bool:
        return request_id in self._running

    def submit(self, submit: scheduler_pb2.Submit, meter: RequestMeter) -> Mailbox:
        """Sends a request. Raises Refusal(UNAVAILABLE) when the stream is down."""
        assert submit.request_id not in self._running, f"{submit.request_id} is already running"
        if self._outgoing is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"scheduler {self.address}: {self.not_ready_reason}")
        mailbox = Mailbox()
        self._running[submit.request_id] = _Running(mailbox, meter)
        self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(submit=submit))
        return mailbox

    def cancel(self, request_id: str) -> None:
        """Asks the scheduler to end a request; its final message still arrives. Unknown ids are ignored."""
        if request_id in self._running and self._outgoing is not None:
            cancel = scheduler_pb2.Cancel(request_id=request_id)
            self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(cancel=cancel))

    def adjust(self, request_id: str, wish: inference_pb2.Speculation) -> None:
        """Changes how a running request speculates. Unknown ids are ignored."""
        if request_id in self._running and self._outgoing is not None:
            adjust = scheduler_pb2.Adjust(request_id=request_id, speculation=wish)
            self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(adjust=adjust))

    def abandon(self, request_id: str) -> None:
        """Cancels a request whose client has gone: later replies are dropped. Nothing if it has already ended."""
        running = self._running.get(request_id)
        if running is not None and running.mailbox is not None:
            running.mailbox = None
            self.cancel(request_id)

    async def read_status(self) -> scheduler_pb2.SchedulerStatus:
        """What the scheduler says of itself now. Raises grpc's error if it does not answer in time."""
        return await self._stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest(), timeout=STATUS_TIMEOUT_S)

    def trace(
        self, request: scheduler_pb2.TraceRequest
    ) -> "grpc.aio.UnaryStreamCall[scheduler_pb2.TraceRequest, scheduler_pb2.TraceEvent]":
        """A recording of what the scheduler and its groups do; cancelling the call ends it."""
        return self._stub.Trace(request)

    async def run(self) -> None:
        """Serves the link until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_stream_open())
                tasks.create_task(self._follow_status())
        finally:
            await self._channel.close(grace=None)

    async def _keep_stream_open(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            outgoing = self._outgoing = asyncio.Queue()
            reason = "the scheduler closed the stream"
            self._connection = self._stub.Connect(_drain(outgoing))
            try:
                async for batch in self._connection:
                    backoff_s = MIN_BACKOFF_S
                    self._num_unanswered = 0
                    for reply in batch.replies:
                        self._dispatch(reply)
            except grpc.aio.AioRpcError as err:
                reason = f"{err.code().name}: {err.details()}"
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                reason = "it does not answer"  # `_on_silence` has cancelled the call
            self._lose_stream(reason)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _dispatch(self, reply: scheduler_pb2.SchedulerReply) -> None:
        kind = reply.WhichOneof("message")
        running = self._running.get(reply.request_id)
        if running is None:
            return
        if kind == "chunk":
            running.meter.on_chunk(reply.chunk)
            if running.mailbox is not None:
                running.mailbox.put(reply.chunk)
            return
        del self._running[reply.request_id]
        if kind == "complete":
            running.meter.on_complete(reply.complete)
        else:
            running.meter.on_error(status_code(reply.error.code))
        if running.mailbox is not None:
            running.mailbox.finish(reply.complete if kind == "complete" else reply.error)

    def _lose_stream(self, reason: str) -> None:
        self._outgoing = None
        lost, self._running = self._running, {}
        message = f"the connection to scheduler {self.address} was lost ({reason}); try again"
        error = scheduler_pb2.RequestError(code=grpc.StatusCode.UNAVAILABLE.value[0], message=message)
        for running in lost.values():
            running.meter.on_error(grpc.StatusCode.UNAVAILABLE)
            if running.mailbox is not None:
                running.mailbox.finish(error)
        if lost:
            logger.warning("lost the stream to scheduler %s with %d requests: %s", self.address, len(lost), reason)
        self._set_ready(False, reason)

    async def _follow_status(self) -> None:
        """Asks for the status again and again rather than watching the scheduler's health: a scheduler that hangs
        streams nothing, and the reason why it is not ready belongs in the client's error."""
        while True:
            try:
                status = await self.read_status()
                self._num_unanswered = 0
                connected = self._outgoing is not None
                self._set_ready(status.ready and connected, status.not_ready_reason or "not ready")
            except grpc.aio.AioRpcError as err:
                self._set_ready(False, f"{err.code().name}: {err.details()}")
                if err.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._on_silence()
            await asyncio.sleep(_STATUS_INTERVAL_S)

    def _on_silence(self) -> None:
        """The scheduler has not answered a question. One that is stopped keeps its connections."""
        self._num_unanswered += 1
        if self._num_unanswered == _MAX_UNANSWERED and self._connection is not None:
            self._connection.cancel()

    def _set_ready(self, ready: bool, reason: str) -> None:
        self.not_ready_reason = "" if ready else reason
        if self.ready != ready:
            self.ready = ready
            logger.info("scheduler %s is %s", self.address, "ready" if ready else f"not ready: {reason}")
            self._on_change()


async def _drain(
    queue: asyncio.Queue[scheduler_pb2.SchedulerRequest],
) -> AsyncIterator[scheduler_pb2.SchedulerRequest]:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            yield await queue.get()
