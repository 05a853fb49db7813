"""Whether a deployment stays the same while it is used badly for a long time.

Well-behaved streams run all the time, as in `bench.chaos`. Others cancel at random moments, break their connection
(over gRPC and, without a word, over HTTP) or read slowly. Every minute a process is killed: in the first half of the
time ranks of draft and target, in the second half scheduler and gateway, so that each process grows old in one of them.

    python -m bench.soak --minutes 30 --save

The report says how the memory of each process has grown since it was five minutes old, how many blocks of the KV cache
are still held once everything has ended, and what became of the tokens. The exit status is 1 if a token was lost,
repeated or changed, a stream failed, a block is held, or a process is left.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import shlex
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos import Chaos, Tally, drill_settings
from bench.crowd import Born, Crowd, Damage, left, make_cases
from bench.report import add_report_options, publish, table
from childproc.wires import open_blocking_channel
from cluster.deployment.settings import ServerSettings
from cluster.local import LocalDeployment
from echelon import AsyncClient
from echelon.errors import EchelonError
from echelon.pb import scheduler_pb2, scheduler_pb2_grpc
from echelon.pb.process_pb2 import ProcessIdentity

_WORKERS, _CONTROL = ("draft", "target"), ("scheduler", "gateway")
_KILL_EVERY_S = 60.0
_SAMPLE_S = 5.0
_OLD_S = 300.0  # a process has seen everything by then
_IDLE_LIMIT_S = 60.0
_SLOW_S = 1.0  # at most, between two chunks
_PAGE = 4096
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@dataclass(slots=True, kw_only=True)
class Life:
    """Of one process, from when it was first seen."""

    name: str
    began_s: float
    born: Born
    rss: list[tuple[float, int]] = field(default_factory=list)  # age in seconds, bytes

    @property
    def age_s(self) -> float:
        return self.rss[-1][0]

    def at(self, age_s: float) -> int:
        return next(size for age, size in self.rss if age >= age_s)


class Memory:
    """The resident memory of every process of a deployment, and of their children, while it lives."""

    def __init__(self, deployment: LocalDeployment) -> None:
        self._deployment = deployment
        self.lives: dict[int, Life] = {}  # by pid

    async def watch(self) -> None:
        while True:
            for name, pid in self._processes():
                self._sample(name, pid)
            await asyncio.sleep(_SAMPLE_S)

    def _processes(self) -> Iterator[tuple[str, int]]:
        for process in self._deployment.processes.read(lambda board: board.processes):
            if process.pid is not None:
                yield process.name, process.pid
                yield from ((f"{process.name}, child", pid) for pid in _children(process.pid))

    def _sample(self, name: str, pid: int) -> None:
        with contextlib.suppress(OSError):  # it has ended
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
            life = self.lives.setdefault(pid, Life(name=name, began_s=time.monotonic(), born=Born.with_pid(pid)))
            life.rss.append((time.monotonic() - life.began_s, size))


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Misuse:
    """Clients that behave badly, each in its own way, again and again."""

    def __init__(self, crowd: Crowd, address: str, http_port: int, rng: random.Random) -> None:
        self._crowd, self._address, self._http_port, self._rng = crowd, address, http_port, rng
        self.damage = Damage()  # of what slow readers have read to the end
        self.counts: Counter[str] = Counter()

    @asynccontextmanager
    async def running(self, number: int) -> AsyncIterator[None]:
        """So many of each kind run inside."""
        kinds = (self._cancel, self._disconnect, self._reset_http, self._read_slowly)
        tasks = [asyncio.create_task(self._repeat(kind.__name__.strip("_"), kind)) for kind in kinds * number]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(self, name: str, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await act()
                self.counts[name.replace("_", " ")] += 1
            except (EchelonError, OSError) as err:  # what it wanted to break was already broken
                self.counts[f"{name.replace('_', ' ')}: {type(err).__name__}"] += 1
                await asyncio.sleep(1.0)

    async def _cancel(self) -> None:
        async with AsyncClient(self._address) as client:
            await self._read_some(client)

    async def _disconnect(self) -> None:
        """The connection goes with the stream in it."""
        client = AsyncClient(self._address)
        case = self._rng.choice(self._crowd.cases)
        stream = client.stream(case.prompt, **case.options)
        await anext(aiter(stream), None)
        await client.close()

    async def _read_some(self, client: AsyncClient) -> None:
        case = self._rng.choice(self._crowd.cases)
        num_chunks = self._rng.randint(0, 20)
        async with client.stream(case.prompt, **case.options) as stream:
            async for _ in stream:
                num_chunks -= 1
                if num_chunks < 0:
                    return

    async def _reset_http(self) -> None:
        """A reset connection in the middle of an answer, or of the question."""
        body = b'{"prompt": "def f(", "max_tokens": 100, "ignore_eos": true, "stream": true}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode()
        request = head + b"Content-Type: application/json\r\n\r\n" + body
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        plain: socket.socket = writer.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if self._rng.random() < 0.2:
            writer.write(request[: self._rng.randrange(len(request))])
        else:
            writer.write(request)
            await reader.read(self._rng.choice([1, 100, 2000]))
        writer.close()

    async def _read_slowly(self) -> None:
        number = self._rng.randrange(len(self._crowd.cases))
        async with AsyncClient(self._address) as client:
            seen = await self._crowd.read(client, self._crowd.cases[number], pause=self._pause)
        if seen.is_refused:
            raise EchelonError("UNAVAILABLE", seen.error)
        self.damage.add(self._crowd.expected[number], seen)

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(0, _SLOW_S))


def num_held_blocks(scheduler_address: str, identity: ProcessIdentity | None = None) -> int:
    """Blocks of target and draft that somebody still holds once no request is left, which is waited for."""
    deadline = time.monotonic() + _IDLE_LIMIT_S
    with open_blocking_channel(scheduler_address, identity=identity) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        while True:
            status = stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest(), timeout=10)
            held = status.num_blocks - status.num_free_blocks + status.num_draft_blocks - status.num_free_draft_blocks
            is_idle = not status.num_requests_running + status.num_requests_waiting
            if (is_idle and held == 0) or time.monotonic() > deadline:
                return int(held)
            time.sleep(0.1)


async def soak(chaos: Chaos, misuse: Misuse, memory: Memory, args: argparse.Namespace) -> Tally:
    tally = Tally()
    await chaos.observe()
    watching = asyncio.create_task(memory.watch())
    async with chaos.load(), misuse.running(args.misusers):
        began_s = time.monotonic()
        for number in itertools.count(1):
            next_s = began_s + number * _KILL_EVERY_S
            if next_s > began_s + 60 * args.minutes:
                await asyncio.sleep(max(0.0, began_s + 60 * args.minutes - time.monotonic()))
                break
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            roles = _WORKERS if number * _KILL_EVERY_S < 30 * args.minutes else _CONTROL
            await chaos.lose(roles[number % 2], "kill", tally)
            print(f"{number} min: {roles[number % 2]} killed; {tally.damage}", file=sys.stderr, flush=True)
        chaos.crowd.take_ended(tally.damage)
        watching.cancel()
    return tally


def memory_table(memory: Memory) -> str:
    rows = [
        [life.name, f"{life.age_s / 60:.0f}", f"{old / 1e6:.1f}", f"{end / 1e6:.1f}", f"{100 * (end / old - 1):+.1f} %"]
        for life in sorted(memory.lives.values(), key=lambda life: life.name)
        if life.age_s > 1.5 * _OLD_S
        for old, end in [(life.at(_OLD_S), life.rss[-1][1])]
    ]
    return table(["process", "lived (min)", "RSS at 5 min (MB)", "at the end (MB)", "growth"], rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=12, help="that behave, at once (default: 12)")
    parser.add_argument("--misusers", type=int, default=2, help="of each of four kinds (default: 2)")
    parser.add_argument("--tokens", type=int, default=48, help="of each sample (default: 48)")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the target (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    args = parse_args()
    port = free_port()
    settings = drill_settings(tp=args.tp, server=ServerSettings(grpc_port=0, http_port=port))
    rng = random.Random(args.seed)
    with LocalDeployment(settings, gateway=True) as deployment:
        chaos, memory = Chaos(deployment, make_cases(args.streams, args.tokens), rng), Memory(deployment)
        misuse = Misuse(chaos.crowd, deployment.running.gateway_address, port, rng)
        tally = asyncio.run(soak(chaos, misuse, memory, args))
        held = num_held_blocks(deployment.running.replicas[0].scheduler_address)
    remains = left(chaos.born | {life.born for life in memory.lives.values()})
    lines = [
        memory_table(memory),
        "",
        f"Streams that behave: {tally.damage}",
        f"Slow readers: {misuse.damage}",
        f"{len(tally.healthy_s)} kills. Misuse: {', '.join(f'{n} x {kind}' for kind, n in misuse.counts.items())}.",
        f"{held} blocks are held at the end; {len(remains)} of {len(memory.lives)} processes are left.",
    ]
    publish("soak", "\n".join(lines), command=shlex.join(["python", "-m", "bench.soak", *sys.argv[1:]]), save=args.save)
    return int(bool(remains or held) or tally.damage.is_any or misuse.damage.is_any)


if __name__ == "__main__":
    sys.exit(main())
