"""The gateway's end of a scheduler's multiplexed stream."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from itertools import islice

import grpc

from echelon.pb import inference_pb2, process_pb2, scheduler_pb2
from gateway.metrics import RequestMeter
from gateway.replicas.channel import MAX_BACKOFF_S, MIN_BACKOFF_S, drain, is_asked_to_end, open_scheduler
from gateway.replicas.events import StatusWatch
from gateway.replicas.mailbox import Mailbox
from gateway.replicas.progress import Progress, RunningRequest
from gateway.replicas.routing import CachedBlocks
from gateway.requests.refusal import Refusal

logger = logging.getLogger(__name__)

_Connection = grpc.aio.StreamStreamCall[scheduler_pb2.SchedulerRequest, scheduler_pb2.SchedulerReplies]

_STATUS_INTERVAL_S = 0.5
STATUS_TIMEOUT_S = 2.0  # with the interval: a scheduler that hangs is seen within 2.5 s
# Unanswered questions in a row, without a reply, after which requests are given up: 7 s, since busy machines stall.
_MAX_UNANSWERED = 3
# Of requests that another replica may serve: a full queue, or a replica that stops or was given up.
_REFUSALS = {code.value[0] for code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)}
_MOST_KEPT = 1024  # requests that wait for a scheduler to come back; not measured
_STARTED_AGAIN = "it was started again"


class SchedulerLink:
    """Keeps one stream to one scheduler open, hands replies to the mailboxes of their requests, and knows whether
    the scheduler would serve a request now.

    A request whose stream breaks, or whose scheduler falls silent, ends with UNAVAILABLE or, if the link keeps
    requests, goes on with the next stream. An abandoned request keeps its id until the scheduler has confirmed its end,
    so that a new request under the same id never receives the old one's replies.
    """

    def __init__(
        self,
        address: str,
        watch: StatusWatch,
        *,
        on_change: Callable[[], None],
        on_refusal: Callable[[str, RunningRequest], bool] = lambda request_id, running: False,
        keeps_requests: bool = False,
        identity: process_pb2.ProcessIdentity | None = None,
        model: tuple[str, str] = ("", ""),
    ) -> None:
        """`watch` sees every status. `on_refusal` gives a request that is not served here to another link, if it can.
        `keeps_requests`: whoever started the scheduler starts it again, and says where (`redirect`) or that it does
        not (`give_up`)."""
        self._watch, self._identity = watch, identity
        self.model_id, self.model_name = model
        self.ready = self.was_ready = False
        self.not_ready_reason, self.cache = "not connected yet", CachedBlocks()
        self._on_change, self._on_refusal, self._keeps_requests = on_change, on_refusal, keeps_requests
        self._given_up = ""  # why nobody starts the scheduler again
        self.is_retiring = self.takes_requests = False  # it may take some while it is not ready: they wait until it is
        self._redirected = asyncio.Event()
        self._open_channel(address)
        self._outgoing: asyncio.Queue[scheduler_pb2.SchedulerRequest] | None = None  # None: no stream
        self._connection: _Connection | None = None
        self._num_unanswered = 0  # questions for the status since the scheduler was last heard from
        self._running: dict[str, RunningRequest] = {}
        self._num_of_others = 0  # requests that other gateways have there, as last heard

    def _open_channel(self, address: str) -> None:
        self.address = address
        self._channel, self._stub = open_scheduler(address, self._identity)

    def redirect(self, address: str) -> None:
        """The scheduler was started again there."""
        self._given_up = ""
        if address == self.address:
            return  # where the next attempt to connect goes anyway
        former, connection = self._channel, self._connection
        self._open_channel(address)
        self._num_unanswered = 0
        self._redirected.set()
        if connection is not None:
            connection.cancel()
        self._closing = asyncio.create_task(former.close(grace=None))

    def give_up(self, reason: str) -> None:
        """The scheduler is lost, and is not started again unless `redirect` says so."""
        self._given_up = reason
        if self._outgoing is None:
            self._fail_all(reason)

    def retire(self, retires: bool) -> None:
        """It gets no new requests, or gets them again."""
        self.is_retiring = retires
        if retires:
            self._set_ready(False, "it is being drained")

    def hand_over(self) -> None:
        """What still runs goes on at other schedulers, from where its clients are."""
        self._fail_all("its replica was removed, and no other accepts requests")

    def take_over(self, request_id: str, request: RunningRequest) -> None:
        request.is_sent = False
        self._running[request_id] = request
        self._send_again(request_id, request)

    @property
    def accepts_requests(self) -> bool:
        """Whether a request that comes now is served, though it may have to wait: here, while the scheduler is away."""
        if self.is_retiring:
            return False
        is_awaited = self._keeps_requests and not self._given_up
        return self.takes_requests or (is_awaited and self._outgoing is None and self.num_requests < _MOST_KEPT)

    @property
    def num_requests(self) -> int:
        return len(self._running)

    @property
    def load(self) -> int:
        return len(self._running) + self._num_of_others

    def oldest(self, most: int) -> list[tuple[str, Progress]]:
        """Requests that run, with their ids, in the order in which they came."""
        return [(request_id, running.progress) for request_id, running in islice(self._running.items(), most)]

    def knows(self, request_id: str) -> bool:
        return request_id in self._running

    def submit(self, submit: scheduler_pb2.Submit, mailbox: Mailbox, meter: RequestMeter) -> None:
        """Sends a request, now or when the scheduler is back; replies go to `mailbox`. Raises Refusal(UNAVAILABLE) when
        the stream is down for good."""
        assert submit.request_id not in self._running, f"{submit.request_id} is already running"
        if self._outgoing is None and not self.accepts_requests:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"scheduler {self.address}: {self.not_ready_reason}")
        is_sent = self._outgoing is not None
        progress = Progress(submit, time.monotonic, was_sent=is_sent)
        self._running[submit.request_id] = RunningRequest(mailbox, meter, progress, is_sent=is_sent)
        if self._outgoing is not None:
            self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(submit=submit))

    def cancel(self, request_id: str) -> None:
        """Asks the scheduler to end a request; its final message still arrives. Unknown ids are ignored."""
        if request_id in self._running:
            self._running[request_id].is_cancelled = True
            self._send_cancel(request_id)

    def _send_cancel(self, request_id: str) -> None:
        if self._outgoing is not None and self._running[request_id].is_sent:
            cancel = scheduler_pb2.Cancel(request_id=request_id)
            self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(cancel=cancel))

    def adjust(self, request_id: str, params: inference_pb2.Speculation) -> None:
        """Changes how a running request speculates. Unknown ids are ignored."""
        if request_id not in self._running:
            return
        self._running[request_id].progress.adjust(params)
        if self._outgoing is not None:
            adjust = scheduler_pb2.Adjust(request_id=request_id, speculation=params)
            self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(adjust=adjust))

    def abandon(self, request_id: str) -> None:
        """Cancels a request whose client has gone: later replies are dropped. Nothing if it has already ended."""
        running = self._running.get(request_id)
        if running is None or running.mailbox is None:
            return
        running.mailbox = None
        if running.is_sent:
            self.cancel(request_id)
        else:
            del self._running[request_id]
            running.meter.on_error(grpc.StatusCode.CANCELLED)

    async def read_status(self) -> scheduler_pb2.SchedulerStatus:
        """What the scheduler says of itself now. Raises grpc's error if it does not answer in time."""
        question = self._stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest(), timeout=STATUS_TIMEOUT_S)
        try:
            return await question
        except asyncio.CancelledError:
            if is_asked_to_end():
                raise
            # `redirect` has closed the channel.
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, _STARTED_AGAIN, "") from None

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
            self._redirected.clear()
            reason = "the scheduler closed the stream"
            try:
                status = await self.read_status()  # so that a stream that is lost was there
                outgoing = self._outgoing = asyncio.Queue()
                self.takes_requests = status.accepts_requests
                self._connection = self._stub.Connect(drain(outgoing))
                self._submit_again()
                async for batch in self._connection:
                    backoff_s = MIN_BACKOFF_S
                    self._num_unanswered = 0
                    if batch.HasField("cache"):
                        self.cache.on_report(batch.cache)
                    for reply in batch.replies:
                        self._dispatch(reply)
            except grpc.aio.AioRpcError as err:
                reason = f"{err.code().name}: {err.details()}"
            except asyncio.CancelledError:
                if is_asked_to_end():
                    raise
                # `redirect` or `_on_silence` has cancelled the call.
                reason = _STARTED_AGAIN if self._redirected.is_set() else "it does not answer"
            self._lose_stream(reason)
            backoff_s = await self._pause(backoff_s)

    async def _pause(self, backoff_s: float) -> float:
        """Wait before the next attempt to connect; the time to wait after that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._redirected.wait(), backoff_s)
            return MIN_BACKOFF_S
        return min(2 * backoff_s, MAX_BACKOFF_S)

    def _submit_again(self) -> None:
        """What ran when the last stream was lost. Suspects go one at a time, so that none is taken for another."""
        for request_id, running in list(self._running.items()):
            if not running.is_sent and not (running.is_suspect and self._has_suspect_out()):
                self._send_again(request_id, running)

    def _has_suspect_out(self) -> bool:
        return any(running.is_sent and running.is_suspect for running in self._running.values())

    def _send_again(self, request_id: str, running: RunningRequest) -> None:
        submit = running.progress.submit_again()
        if submit is None:
            del self._running[request_id]
            running.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "its time was over before the scheduler was back")
        elif self._outgoing is not None:
            running.is_sent = True
            self._outgoing.put_nowait(scheduler_pb2.SchedulerRequest(submit=submit))
            if running.is_cancelled:
                self._send_cancel(request_id)

    def _dispatch(self, reply: scheduler_pb2.SchedulerReply) -> None:
        kind = reply.WhichOneof("message")
        running = self._running.get(reply.request_id)
        if running is None:
            return
        was_suspect = running.is_suspect
        if kind == "chunk":
            running.meter.on_chunk(reply.chunk)
            running.progress.on_chunk(reply.chunk)
            if running.mailbox is not None:
                running.mailbox.put(reply.chunk)
        else:
            self._end(running, reply)
        if was_suspect:
            self._submit_again()  # the next suspect, if this one is none any more

    def _end(self, running: RunningRequest, reply: scheduler_pb2.SchedulerReply) -> None:
        del self._running[reply.request_id]
        if reply.error.code in _REFUSALS and self._moves(reply.request_id, running):
            return
        running.finish(reply.complete if reply.HasField("complete") else reply.error)

    def _lose_stream(self, reason: str) -> None:
        was_open, self._outgoing, self._connection = self._outgoing is not None, None, None
        self.takes_requests = False
        if was_open and self._running:
            num = len(self._running)
            logger.warning("lost the stream to scheduler %s with %d requests: %s", self.address, num, reason)
        if was_open:
            self._note_losses()
        if self._given_up or not self._keeps_requests:
            self._fail_all(
                self._given_up or f"the connection to scheduler {self.address} was lost ({reason}); try again"
            )
        self._set_ready(False, reason)

    def _note_losses(self) -> None:
        for request_id, running in list(self._running.items()):
            if running.on_loss(request_id):
                del self._running[request_id]

    def _fail_all(self, message: str) -> None:
        lost, self._running = self._running, {}
        for request_id, running in lost.items():
            if not self._moves(request_id, running):
                running.fail(grpc.StatusCode.UNAVAILABLE, message)

    def _moves(self, request_id: str, running: RunningRequest) -> bool:
        """Whether a request that is not served here goes on at another scheduler."""
        if running.mailbox is None:
            return False
        running.progress.begin_again()
        running.refused_by.append(self)
        return self._on_refusal(request_id, running)

    async def _follow_status(self) -> None:
        """Asks for the status again and again rather than watching the scheduler's health: a scheduler that hangs
        streams nothing, and the reason why it is not ready belongs in the client's error."""
        while True:
            try:
                status = await self.read_status()
                self._num_unanswered = 0
                connected = self._outgoing is not None
                self.takes_requests = status.accepts_requests and connected
                num_there = status.num_requests_running + status.num_requests_waiting
                self._num_of_others = max(0, num_there - self.num_requests)
                if not self.is_retiring:
                    self._set_ready(status.ready and connected, status.not_ready_reason or "not ready")
                self._watch.on_status(status)
            except grpc.aio.AioRpcError as err:
                # One that is started again takes what it was sent before it fell silent, or its successor does.
                self.takes_requests = self.takes_requests and self._keeps_requests
                self._set_ready(False, f"{err.code().name}: {err.details()}")
                self._watch.on_unreachable(self.not_ready_reason)
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
            self.was_ready = self.was_ready or ready
            logger.info("scheduler %s is %s", self.address, "ready" if ready else f"not ready: {reason}")
            self._on_change()
