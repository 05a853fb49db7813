"""A scheduler that does what the test says, for tests of the gateway."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from echelon.pb import inference_pb2 as pb
from echelon.pb import scheduler_pb2, scheduler_pb2_grpc


class FakeScheduler(scheduler_pb2_grpc.SchedulerServicer):
    """`received` holds what the gateway sent, in order; `send_*` answer on the newest stream."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[scheduler_pb2.SchedulerRequest] = asyncio.Queue()
        self.answers = True  # False: like a stopped process, it keeps its connections and says nothing
        self.asked = asyncio.Semaphore(0)  # status questions that came while it said nothing
        self.ready = True
        self.not_ready_reason = ""
        self.status = scheduler_pb2.SchedulerStatus()  # counters, in addition to the two above
        self.trace: list[scheduler_pb2.TraceEvent] | None = []  # None: refuses to record
        self.traces_asked: list[scheduler_pb2.TraceRequest] = []
        self.trace_left = asyncio.Event()  # nobody reads the last recording any more
        self.streams_opened = asyncio.Semaphore(0)
        self._replies: asyncio.Queue[scheduler_pb2.SchedulerReplies | None] = asyncio.Queue()

    async def Connect(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self._replies = asyncio.Queue()
        self.streams_opened.release()
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while (replies := await self._replies.get()) is not None:
                yield replies
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            await self.received.put(request)

    async def GetSchedulerStatus(self, request: Any, context: Any) -> scheduler_pb2.SchedulerStatus:
        if not self.answers:
            self.asked.release()
            await asyncio.Event().wait()
        status = scheduler_pb2.SchedulerStatus(
            ready=self.ready, accepts_requests=self.ready, not_ready_reason=self.not_ready_reason
        )
        status.MergeFrom(self.status)
        return status

    async def Trace(self, request: scheduler_pb2.TraceRequest, context: Any) -> AsyncIterator[Any]:
        self.traces_asked.append(request)
        if self.trace is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another recording runs")
        self.trace_left.clear()
        try:
            for event in self.trace or ():
                yield event
            if not request.num_rounds and not request.duration_s:
                await asyncio.Event().wait()
        finally:
            self.trace_left.set()

    async def next_submit(self) -> scheduler_pb2.Submit:
        request = await self.received.get()
        assert request.HasField("submit"), f"expected a submit, got {request}"
        return request.submit

    async def next_cancel(self) -> str:
        request = await self.received.get()
        assert request.HasField("cancel"), f"expected a cancel, got {request}"
        return request.cancel.request_id

    async def wait_for_cancel(self, request_id: str) -> None:
        """Waits for a cancel and skips everything else."""
        while (await self.received.get()).cancel.request_id != request_id:
            pass

    async def next_adjust(self) -> scheduler_pb2.Adjust:
        request = await self.received.get()
        assert request.HasField("adjust"), f"expected an adjust, got {request}"
        return request.adjust

    def send_chunk(self, request_id: str, token_ids: list[int], text: str, **fields: Any) -> None:
        chunk = pb.GenerateChunk(token_ids=token_ids, text=text, **fields)
        self._send(scheduler_pb2.SchedulerReply(request_id=request_id, chunk=chunk))

    def send_complete(
        self, request_id: str, *, reason: Any = pb.FINISH_REASON_LENGTH, num_samples: int = 1, **fields: Any
    ) -> None:
        complete = pb.GenerateComplete(
            finished=[pb.Finished(index=i, reason=reason) for i in range(num_samples)],
            usage=pb.Usage(
                prompt_tokens=3, completion_tokens=2, cached_prompt_tokens=1, approximations=["attention: rough"]
            ),
            speculation=pb.SpeculationStats(num_rounds=1, num_draft_tokens=4, num_accepted_tokens=1),
            seed=7,
            **fields,
        )
        self._send(scheduler_pb2.SchedulerReply(request_id=request_id, complete=complete))

    def send_error(self, request_id: str, code: grpc.StatusCode, message: str) -> None:
        error = scheduler_pb2.RequestError(code=code.value[0], message=message)
        self._send(scheduler_pb2.SchedulerReply(request_id=request_id, error=error))

    def send_cache(self, added: list[int], removed: list[int] | None = None, *, from_nothing: bool = False) -> None:
        """That it has cached blocks of 4 tokens with these short digests, or not any more."""
        report = scheduler_pb2.CacheReport(
            from_nothing=from_nothing, block_size=4, num_blocks=1000, added=added, removed=removed
        )
        self._replies.put_nowait(scheduler_pb2.SchedulerReplies(cache=report))

    def drop_stream(self) -> None:
        self._replies.put_nowait(None)

    def _send(self, reply: scheduler_pb2.SchedulerReply) -> None:
        self._replies.put_nowait(scheduler_pb2.SchedulerReplies(replies=[reply]))


async def serve(scheduler: FakeScheduler, port: int = 0) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(scheduler, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, f"127.0.0.1:{port}"
