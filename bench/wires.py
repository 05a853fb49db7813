"""What mutual TLS costs a message between two processes: there and back on an open stream, as a round travels.

python -m bench.wires --save
"""

import argparse
import asyncio
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from bench.report import add_report_options, publish, table
from childproc.wires import listen, open_channel
from cluster.authority import Authority
from echelon.pb.process_pb2 import ProcessIdentity

_METHOD = "/bench.Wires/Echo"
_SIZES = (200, 4 << 10, 64 << 10)  # bytes; a decode round of few seqs, of many, and a long prefill


async def _echo(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message


def serve(identity: bytes, ports: "multiprocessing.Queue[int]") -> None:
    async def run() -> None:
        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(_echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Wires", {"Echo": handler}),))
        ports.put(listen(server, "127.0.0.1:0", ProcessIdentity.FromString(identity)))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(run())


async def measure(port: int, identity: ProcessIdentity, num_bytes: int, repeats: int) -> list[float]:
    """Seconds of each way there and back."""
    message, times = bytes(num_bytes), []
    async with open_channel(f"127.0.0.1:{port}", identity=identity) as channel:
        call: Any = channel.stream_stream(_METHOD)()
        for number in range(repeats + repeats // 10):
            began_s = time.perf_counter()
            await call.write(message)
            await call.read()
            if number >= repeats // 10:  # the first ones warm up
                times.append(time.perf_counter() - began_s)
        call.cancel()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000, help="messages of each size (default: 2000)")
    add_report_options(parser)
    args = parser.parse_args()
    authority, rows = Authority.create("bench"), []
    for name, ends in (
        ("plain", [ProcessIdentity(), ProcessIdentity()]),
        ("mutual TLS", [authority.issue("a"), authority.issue("b")]),
    ):
        ports: multiprocessing.Queue[int] = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve, args=(ends[0].SerializeToString(), ports))
        server.start()
        port = ports.get()
        for num_bytes in _SIZES:
            times = sorted(asyncio.run(measure(port, ends[1], num_bytes, args.repeats)))
            p99 = times[int(0.99 * len(times))]
            rows.append([name, str(num_bytes), f"{1e6 * statistics.median(times):.0f}", f"{1e6 * p99:.0f}"])
        server.terminate()
        server.join()
    report = table(["wire", "bytes each way", "p50 (us)", "p99 (us)"], rows)
    publish("wires", report, command=shlex.join(["python", "-m", "bench.wires", *sys.argv[1:]]), save=args.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
