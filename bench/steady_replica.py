"""A replica without a model, for measurements of the gateway: a first token at once, then one each INTERVAL_S.

All streams advance in rounds, and a round is one message, as a scheduler sends it. A stream of MOST_TOKENS gets its
first one and stays idle.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from echelon.pb import inference_pb2 as pb
from echelon.pb.scheduler_pb2 import SchedulerReplies, SchedulerReply, SchedulerStatus
from echelon.pb.scheduler_pb2_grpc import SchedulerServicer, add_SchedulerServicer_to_server

MOST_TOKENS = 200
INTERVAL_S = 0.1


@contextlib.contextmanager
def steady_replica() -> Iterator[str]:
    """The address of one that runs in a process of its own."""
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    process = multiprocessing.Process(target=_serve, args=(ports,))
    process.start()
    try:
        yield f"127.0.0.1:{ports.get(timeout=60)}"
    finally:
        process.terminate()
        process.join()


def _serve(ports: "multiprocessing.Queue[int]") -> None:
    async def run() -> None:
        server = grpc.aio.server()
        add_SchedulerServicer_to_server(_SteadyReplica(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ports.put(port)
        await server.wait_for_termination()

    asyncio.run(run())


class _SteadyReplica(SchedulerServicer):
    async def GetSchedulerStatus(self, request: Any, context: Any) -> SchedulerStatus:
        return SchedulerStatus(ready=True, accepts_requests=True)

    async def Connect(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        left: dict[str, int] = {}  # chunks that each stream still gets
        replies: asyncio.Queue[SchedulerReplies] = asyncio.Queue()
        tasks = [asyncio.create_task(_read(request_iterator, left, replies)), asyncio.create_task(_tick(left, replies))]
        try:
            while True:
                yield await replies.get()
        finally:
            for task in tasks:
                task.cancel()


async def _read(requests: AsyncIterator[Any], left: dict[str, int], replies: asyncio.Queue[SchedulerReplies]) -> None:
    async for request in requests:
        if request.HasField("cancel"):
            left.pop(request.cancel.request_id, None)
        elif request.HasField("submit"):
            name, num_tokens = request.submit.request_id, request.submit.sampling.max_tokens
            replies.put_nowait(
                SchedulerReplies(replies=[_chunk(name), *([_complete(name)] if num_tokens == 1 else [])])
            )
            if 1 < num_tokens < MOST_TOKENS:
                left[name] = num_tokens - 1


async def _tick(left: dict[str, int], replies: asyncio.Queue[SchedulerReplies]) -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number in itertools.count(1):
        await asyncio.sleep(began_s + number * INTERVAL_S - loop.time())
        round_ = [_chunk(name) for name in left]
        ended = [name for name, num_chunks in left.items() if num_chunks == 1]
        round_ += map(_complete, ended)
        for name in ended:
            del left[name]
        for name in left:
            left[name] -= 1
        if round_:
            replies.put_nowait(SchedulerReplies(replies=round_))


def _chunk(name: str) -> SchedulerReply:
    return SchedulerReply(request_id=name, chunk=pb.GenerateChunk(token_ids=[100], text=" token", drafted=[False]))


def _complete(name: str) -> SchedulerReply:
    complete = pb.GenerateComplete(
        finished=[pb.Finished(reason=pb.FINISH_REASON_LENGTH)], usage=pb.Usage(prompt_tokens=3, completion_tokens=1)
    )
    return SchedulerReply(request_id=name, complete=complete)
