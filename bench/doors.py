"""What HTTP costs the gateway against gRPC: time to the first token, CPU time of a chunk, memory of idle clients.

The gateway is the real process; a replica without a model answers at once, then sends each stream a token every 100 ms.
Clients read raw bytes, so that they cost little at either door. Streams of 20 tokens are kept running side by side:
where one ends, the next begins. Their CPU time is that of the gateway process, requests included. Then requests for one
token come one after another beside them, each on a connection of its own at HTTP, and their first tokens are timed.

    chrt -f 50 python -m bench.doors --save

The exit status is 1 where HTTP adds more than MOST_FIRST_TOKEN_MS to the median first token, or needs more than
MOST_CPU_RATIO times the CPU time of gRPC.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from bench.report import add_report_options, publish, table
from bench.steady_replica import INTERVAL_S, MOST_TOKENS, steady_replica
from childproc.wires import open_channel
from echelon import __version__
from echelon.pb import process_pb2
from echelon.pb.inference_pb2 import ChatMessage, ChatMessages, GenerateRequest

ROOT = Path(__file__).parents[1]
MOST_FIRST_TOKEN_MS = 0.3
MOST_CPU_RATIO = 2.0
TEXT = "def f"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "demo", "prompt": TEXT, "stream": True},
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": TEXT}], "stream": True},
}
SAME: dict[str, GenerateRequest] = {  # over gRPC
    "/v1/completions": GenerateRequest(text=TEXT),
    "/v1/chat/completions": GenerateRequest(chat=ChatMessages(messages=[ChatMessage(role="user", content=TEXT)])),
}
NUM_TOKENS = 20  # of a stream
NUM_PROBES = 100
_AT_ONCE = 50
Door = Callable[[int], Awaitable[float]]  # a stream of so many tokens; the seconds until its first one


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    pid: int
    address: str
    http_port: int

    def cpu_s(self) -> float:
        """Of all its threads, without the processes that read requests for it."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory_bytes(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@contextlib.contextmanager
def running_gateway() -> Iterator[GatewayProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        http_port = int(probe.getsockname()[1])
    with steady_replica() as replica:
        spec = process_pb2.GatewaySpec(
            name="bench",
            version=__version__,
            server=process_pb2.ServerSection(host="127.0.0.1", http_port=http_port),
            model_name="demo",
            model_dir=str(ROOT / "models" / "demo-target"),
            scheduler_addresses=[replica],
            max_model_len=256,
            vocab_size=4096,
        )
        command = [sys.executable, "-m", "gateway"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json_format.MessageToJson(spec, indent=None).encode() + b"\n")
            process.stdin.flush()
            events = (json_format.Parse(line, process_pb2.ProcessEvent()) for line in process.stdout)
            address = next(event.ready.address for event in events if event.HasField("ready"))
            yield GatewayProcess(process.pid, address, http_port)
        finally:
            process.kill()
            process.wait()


async def http_stream(port: int, path: str, num_tokens: int) -> float:
    """On a connection of its own, which is open before the clock starts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        first_s = await http_first_token(reader, writer, path, num_tokens)
        await reader.readuntil(b"[DONE]")
    return first_s


async def http_first_token(reader: StreamReader, writer: StreamWriter, path: str, num_tokens: int) -> float:
    body = json.dumps({**BODIES[path], "max_tokens": num_tokens}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    sent_s = time.perf_counter()
    writer.write(head.encode() + body)
    await reader.readuntil(b" token")
    return time.perf_counter() - sent_s


async def grpc_stream(generate: Any, path: str, num_tokens: int) -> float:
    request = GenerateRequest.FromString(SAME[path].SerializeToString())
    request.sampling.max_tokens = num_tokens
    data = request.SerializeToString()
    sent_s, first_s = time.perf_counter(), 0.0
    async for message in generate(data):
        if not first_s and b" token" in message:
            first_s = time.perf_counter() - sent_s
    return first_s


@dataclass(frozen=True, slots=True)
class Measured:
    first_token_ms: float  # p50
    p99_ms: float
    cpu_us: float  # of a chunk


async def measure(gateway: GatewayProcess, door: Door, num_streams: int, seconds: float) -> Measured:
    """The streams beside each other begin apart from each other."""
    lasts_s = NUM_TOKENS * INTERVAL_S

    async def one_after_another(number: int) -> None:
        await asyncio.sleep(number / num_streams * lasts_s)
        while True:
            await door(NUM_TOKENS)

    running = [asyncio.create_task(one_after_another(number)) for number in range(num_streams)]
    await asyncio.sleep(lasts_s)
    before_s, began_s = gateway.cpu_s(), time.perf_counter()
    await asyncio.sleep(seconds)
    num_chunks = num_streams * (time.perf_counter() - began_s) / INTERVAL_S
    cpu_us = 1e6 * (gateway.cpu_s() - before_s) / num_chunks
    firsts_ms = sorted([1e3 * await door(1) for _ in range(NUM_PROBES)])
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return Measured(statistics.median(firsts_ms), firsts_ms[int(0.99 * NUM_PROBES)], cpu_us)


async def measure_all(gateway: GatewayProcess, args: argparse.Namespace) -> dict[tuple[int, str, str], Measured]:
    """By the number of streams, the path, and the door."""
    results: dict[tuple[int, str, str], Measured] = {}
    async with open_channel(gateway.address) as channel:
        generate = channel.unary_stream("/echelon.v1.Inference/Generate")
        for num_streams, path in itertools.product(args.streams, BODIES):
            doors: dict[str, Door] = {
                "gRPC": functools.partial(grpc_stream, generate, path),
                "HTTP": functools.partial(http_stream, gateway.http_port, path),
            }
            for name, door in doors.items():
                results[num_streams, path, name] = await measure(gateway, door, num_streams, args.seconds)
                print(f"{num_streams} streams like {path} over {name}: measured", file=sys.stderr)
    return results


async def idle_bytes(gateway: GatewayProcess, num_clients: int) -> float:
    """What a client that has had its first token and waits for more costs the gateway in memory."""
    path, port = "/v1/chat/completions", gateway.http_port
    await http_stream(port, path, 1)  # loads what is loaded once
    before, clients = gateway.memory_bytes(), []
    for _ in range(0, num_clients, _AT_ONCE):
        pairs = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(_AT_ONCE)))
        await asyncio.gather(*(http_first_token(*pair, path, MOST_TOKENS) for pair in pairs))
        clients += pairs  # a stream that nobody holds is closed
    return (gateway.memory_bytes() - before) / num_clients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=1.5, help="of CPU time, for each row")
    parser.add_argument("--idle", type=int, default=1000, help="clients, a multiple of 50")
    add_report_options(parser)
    args = parser.parse_args()
    with running_gateway() as gateway:
        results = asyncio.run(measure_all(gateway, args))
    with running_gateway() as gateway:  # one whose memory has not grown yet
        memory = asyncio.run(idle_bytes(gateway, args.idle))
        total = gateway.memory_bytes()
    rows, is_good = [], True
    for (num_streams, path, door), found in results.items():
        base = results[num_streams, path, "gRPC"]
        added_ms, ratio = found.first_token_ms - base.first_token_ms, found.cpu_us / base.cpu_us
        is_good = is_good and added_ms <= MOST_FIRST_TOKEN_MS and ratio <= MOST_CPU_RATIO
        numbers = (found.first_token_ms, added_ms, found.p99_ms, found.cpu_us, ratio)
        rows.append([str(num_streams), path, door, *(f"{number:.2f}" for number in numbers)])
    header = [
        "streams",
        "request",
        "door",
        "first token, p50 ms",
        "added ms",
        "p99 ms",
        "CPU of a chunk, us",
        "of gRPC's",
    ]
    idle = f"{args.idle} idle SSE clients: {memory / 1024:.1f} KiB each; the gateway then has {total / 2**20:.0f} MiB."
    command = shlex.join(["python", "-m", "bench.doors", *sys.argv[1:]])
    publish("doors", f"{table(header, rows)}\n\n{idle}", command=command, save=args.save)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
