"""Serves fake engines over gRPC, for tests of the scheduler process."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from echelon.pb import worker_pb2, worker_pb2_grpc
from tests.helpers.fake_group import FakeEngine


class FakeGroupServer(worker_pb2_grpc.WorkerServicer):
    """One group with one or two engines. `pause` leaves rounds unanswered; `drop_streams` breaks every stream."""

    def __init__(self, *engines: FakeEngine, version: str = "test") -> None:
        self.engines = {engine.role: engine for engine in engines}
        self.version = version
        self.is_there = True  # False: like a stopped process, it keeps its connections and says nothing
        self.silent_s = 0.0  # for how long rank 1 has not answered its leader
        self.num_streams = 0  # opened so far
        self.shift_round_ids = 0  # makes the group answer rounds that nobody sent
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._dropped = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> str:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return f"127.0.0.1:{bound}"

    async def stop(self) -> None:
        assert self._server is not None
        self._resumed.set()
        await self._server.stop(None)

    def pause(self) -> None:
        self._resumed.clear()

    def resume(self) -> None:
        self._resumed.set()

    def drop_streams(self) -> None:
        self._dropped.set()
        self._dropped = asyncio.Event()

    async def GetWorkerInfo(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:
        if not self.is_there:
            await asyncio.Event().wait()
        engines = list(self.engines.values())
        return worker_pb2.WorkerInfo(
            version=self.version,
            incarnation=engines[0].incarnation,
            world_size=2,
            engines=[engine.info for engine in engines],
            silent_rank=int(self.silent_s > 0),
            silent_s=self.silent_s,
        )

    async def Rounds(
        self, request_iterator: AsyncIterator[worker_pb2.RoundRequest], context: Any
    ) -> AsyncIterator[worker_pb2.RoundReply]:
        hello = (await anext(aiter(request_iterator))).hello
        self.num_streams += 1
        engine = self.engines[hello.role]
        engine.reset()
        if engine.tiers is not None and engine.tiers.num_disk_blocks:
            yield worker_pb2.RoundReply(disk=engine.tiers.contents())
        dropped = asyncio.create_task(self._dropped.wait())
        while True:
            answer = asyncio.create_task(self._next_reply(engine, request_iterator))
            await asyncio.wait({answer, dropped}, return_when=asyncio.FIRST_COMPLETED)
            if dropped.done():
                answer.cancel()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the test")
            reply = answer.result()
            if reply is None:
                dropped.cancel()
                return
            yield reply

    async def _next_reply(
        self, engine: FakeEngine, requests: AsyncIterator[worker_pb2.RoundRequest]
    ) -> worker_pb2.RoundReply | None:
        request = await anext(aiter(requests), None)
        if request is None:
            return None
        await self._resumed.wait()
        if request.HasField("move"):
            engine.order(request.move)
            return worker_pb2.RoundReply(move=engine.move(request.move))
        result = engine.run(request.round)
        result.round_id += self.shift_round_ids
        return worker_pb2.RoundReply(result=result)
