"""A short run of the fuzzer of the ports inside; `tests.property.hostile_ports --messages` has the long one."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from childproc.wires import listen, open_blocking_channel
from cluster.authority import Authority
from echelon.pb.process_pb2 import ProcessIdentity
from tests.helpers.fuzzed_ports import HTTP2, PATHS, Strangers, odd_call, send_with_certificate


class Handlers(grpc.GenericRpcHandler):
    """Take every call, and count what comes."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.all_have_come = asyncio.Event()
        self.expected = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        assert details.method in PATHS
        return grpc.stream_stream_rpc_method_handler(self._take)

    async def _take(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.num_calls += 1
        if self.num_calls == self.expected:
            self.all_have_come.set()
        async for _ in requests:
            pass
        yield b""


@asynccontextmanager
async def serving(identity: ProcessIdentity) -> AsyncIterator[tuple[Handlers, int]]:
    server, handlers = grpc.aio.server(), Handlers()
    server.add_generic_rpc_handlers((handlers,))
    port = listen(server, "127.0.0.1:0", identity)
    await server.start()
    yield handlers, port
    await server.stop(grace=None)


async def test_handmade_calls_are_calls() -> None:
    rng = random.Random(1)
    async with serving(ProcessIdentity()) as (handlers, port):
        handlers.expected = 5
        calls = b"".join(odd_call(rng, stream_id) for stream_id in (1, 3, 5, 7, 9))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HTTP2 + calls)
        async with asyncio.timeout(60):
            await handlers.all_have_come.wait()
        writer.close()


async def test_nothing_of_a_stranger_reaches_a_handler_of_a_locked_port() -> None:
    authority = Authority.create("mine")
    async with serving(authority.issue("scheduler-0")) as (handlers, port):
        num_bytes = await asyncio.to_thread(Strangers().send, ("127.0.0.1", port), 200, random.Random(1))
        assert (num_bytes, handlers.num_calls) == (0, 0)
        with open_blocking_channel(f"127.0.0.1:{port}", identity=authority.issue("gateway-0")) as channel:
            ends = await asyncio.to_thread(send_with_certificate, channel, 50, random.Random(1), call_s=60.0)
        assert ends["OK"] == ends.total() == handlers.num_calls - 1, "one more asked who serves"
