"""Where a request is read: a short one here and now, any other in a process that can be given up."""

import asyncio
from collections.abc import Awaitable

from echelon.pb.process_pb2 import GatewaySpec
from echelon.pb.reading_pb2 import Reading
from gateway.requests.forms import Form, read_simple_request
from gateway.requests.lane import Lane
from gateway.requests.reader_process import ReaderProcess
from gateway.requests.validation import RequestValidator

_INLINE_BYTES = 1024  # takes 1 ms at most; the way to another process and back takes half of one
_QUICK_BYTES = 16 << 10
_QUICK_CPU_S, _BULK_CPU_S = 1.0, 8.0  # a million tokens take 3 s
_BULK_NICENESS = 5  # long requests leave the cores to short ones and to the event loop; not measured
# Wall time for a CPU limit: others may have the cores, and a call into C ends before it is interrupted.
_WALL_PER_CPU, _WALL_MARGIN_S = 2.0, 1.0
_QUICK_WAITING_BYTES, BULK_WAITING_BYTES = 16 << 20, 128 << 20  # a longer request could not wait at all


class RequestReader:
    """Reads requests for one gateway without holding up its event loop.

    Conversations go to a process even if they are short, because what a template does is not known. There are two
    processes, so that nobody's long request delays a short one.
    """

    def __init__(self, spec: GatewaySpec, validator: RequestValidator) -> None:
        self._validator = validator
        self._turn = asyncio.Lock()
        self._quick = _lane(spec, _QUICK_CPU_S, niceness=0, max_waiting_bytes=_QUICK_WAITING_BYTES)
        self._bulk = _lane(spec, _BULK_CPU_S, niceness=_BULK_NICENESS, max_waiting_bytes=BULK_WAITING_BYTES)

    def open(self) -> None:
        """Starts the processes, so that the first request need not wait for them."""
        self._quick.open()
        self._bulk.open()

    async def close(self) -> None:
        await asyncio.gather(self._quick.close(), self._bulk.close())

    async def read(self, form: Form, data: bytes) -> Reading:
        """What a request asks of a scheduler. The caller fills in the deadline. Raises Refusal."""
        if len(data) <= _INLINE_BYTES:
            reading = await self._read_here(form, data)
            if reading is not None:
                return reading
        return await (self._quick if len(data) <= _QUICK_BYTES else self._bulk).read(form, data)

    async def _read_here(self, form: Form, data: bytes) -> Reading | None:
        """None for what may cost more than its bytes."""
        async with self._turn:
            await asyncio.sleep(0)  # many that come at once are read one in each pass of the loop
            return read_simple_request(form, data, self._validator)


def _lane(spec: GatewaySpec, cpu_limit_s: float, *, niceness: int, max_waiting_bytes: int) -> Lane:
    def start() -> Awaitable[ReaderProcess]:
        return ReaderProcess.start(spec, cpu_limit_s=cpu_limit_s, niceness=niceness)

    return Lane(start, limit_s=_WALL_PER_CPU * cpu_limit_s + _WALL_MARGIN_S, max_waiting_bytes=max_waiting_bytes)
