"""What the health service of a gateway says, asked all the time, and from when on after a loss it was right."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from echelon.channel import open_async_channel

_INTERVAL_S = 0.1
_TIMEOUT_S = 1.0  # no answer within it is the answer that nothing is served
_LONG_SILENCE_S = 1.0  # without a token: less happens between two rounds of a busy machine
_SERVICE = "echelon.v1.Inference"
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
)


class HealthWatch:
    """Asks inside `watching`. `samples`: when it asked, and whether it was told SERVING."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.samples: list[tuple[float, bool]] = []

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        async with open_async_channel(self._address, None, *_OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                asked_s = time.monotonic()
                self.samples.append((asked_s, await _is_serving(stub)))
                await asyncio.sleep(_INTERVAL_S)


async def _is_serving(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=_SERVICE), timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def right_after_s(lost_s: float, silence: tuple[float, float], samples: Sequence[tuple[float, bool]]) -> float:
    """Seconds from a loss until health was right from then on; 0: it was never wrong.

    Wrong is SERVING while no token comes for long, until the first NOT_SERVING of that silence: what is said after it
    is that requests will be served, and the first one may still be computed. So is NOT_SERVING while
    tokens come.
    """
    start, end = silence
    wrong_s, has_told = lost_s, end - start < _LONG_SILENCE_S
    for asked_s, serving in samples:
        is_silent = start <= asked_s <= end
        if asked_s < lost_s:
            continue
        has_told = has_told or not serving
        if (serving and is_silent and not has_told) or not (serving or is_silent):
            wrong_s = asked_s
    return wrong_s - lost_s
