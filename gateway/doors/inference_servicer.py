"""The Inference service: translates between clients and schedulers."""

import asyncio
import time
from collections.abc import Sequence

import grpc

import echelon
from echelon.pb import inference_pb2, scheduler_pb2
from gateway.doors.service_handlers import Context
from gateway.metrics import RequestMetrics
from gateway.replicas.mailbox import Mailbox
from gateway.replicas.scheduler_link import SchedulerLink
from gateway.requests.reading import RequestReader
from gateway.requests.refusal import Refusal, status_code


class InferenceServicer:
    """Serves every method of `echelon.v1.Inference`; what becomes of a request is the scheduler's decision."""

    def __init__(
        self,
        reader: RequestReader,
        links: Sequence[SchedulerLink],
        *,
        info: inference_pb2.ModelInfo,
        metrics: RequestMetrics,
    ) -> None:
        self._reader = reader
        self._metrics = metrics
        self._links = links
        self._info = info
        self._started_at = time.monotonic()
        self._draining = False
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_new_requests(self) -> None:
        self._draining = True

    async def wait_until_idle(self) -> None:
        """Until no request runs."""
        await self._idle.wait()

    async def Generate(self, request: bytes, context: Context) -> None:
        meter = self._metrics.start()
        try:
            submit = await self._reader.read(request)
            link = self._choose_link(submit.request_id)
            remaining_s = context.time_remaining()
            if remaining_s is not None:
                submit.timeout_s = remaining_s
            mailbox = link.submit(submit, meter)
        except Refusal as refusal:
            meter.on_error(refusal.code)
            await context.abort(refusal.code, refusal.message)
        self._num_running += 1
        self._idle.clear()
        try:
            await self._forward(submit.request_id, mailbox, context)
        finally:
            link.abandon(submit.request_id)  # does nothing unless the client left before the end
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()

    async def _forward(self, request_id: str, mailbox: Mailbox, context: Context) -> None:
        final = None
        while final is None:
            chunks, final = await mailbox.take()
            for chunk in chunks:
                await context.write(inference_pb2.GenerateResponse(request_id=request_id, chunk=chunk))
        if isinstance(final, scheduler_pb2.RequestError):
            await context.abort(status_code(final.code), final.message)
        await context.write(inference_pb2.GenerateResponse(request_id=request_id, complete=final))

    def _choose_link(self, request_id: str) -> SchedulerLink:
        """The ready scheduler with the fewest requests."""
        if self._draining:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "this gateway is shutting down; try again later")
        if any(link.knows(request_id) for link in self._links):
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS, f"request_id: {request_id!r} is the id of a request that is running"
            )
        ready = [link for link in self._links if link.ready]
        if not ready:
            reasons = "; ".join(f"{link.address}: {link.not_ready_reason}" for link in self._links)
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"no scheduler is ready ({reasons})")
        return min(ready, key=lambda link: link.num_requests)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Context) -> inference_pb2.CancelResponse:
        if not request.request_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request_id: is empty")
        link = next((link for link in self._links if link.knows(request.request_id)), None)
        if link is not None:
            link.cancel(request.request_id)
        return inference_pb2.CancelResponse(found=link is not None)

    async def SetSpeculation(
        self, request: inference_pb2.SetSpeculationRequest, context: Context
    ) -> inference_pb2.SetSpeculationResponse:
        if not request.request_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request_id: is empty")
        link = next((link for link in self._links if link.knows(request.request_id)), None)
        if link is not None:
            link.adjust(request.request_id, request.speculation)
        return inference_pb2.SetSpeculationResponse(found=link is not None)

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.ModelInfo:
        return self._info

    async def GetServerInfo(
        self, request: inference_pb2.GetServerInfoRequest, context: Context
    ) -> inference_pb2.ServerInfo:
        return inference_pb2.ServerInfo(
            version=echelon.__version__,
            uptime_s=time.monotonic() - self._started_at,
            num_replicas=len(self._links),
            num_ready_replicas=sum(link.ready for link in self._links),
        )
