"""A gateway called by attackers in another process, with a scheduler that this process plays."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from childproc.wires import open_channel
from echelon import __version__
from echelon.client import AsyncClient, AsyncStream
from echelon.pb import process_pb2
from gateway.server import Gateway
from tests.helpers.fake_scheduler import FakeScheduler, serve
from tests.helpers.pauses import PauseMeter
from tests.helpers.scrape import free_port

ROOT = Path(__file__).parents[2]
_INTERVAL_S = 0.01


@dataclass
class Report:
    """How long a well-behaved client had to wait, in seconds, and how the attackers' calls ended."""

    pause_s: float = 0.0  # the longest pause of the gateway's event loop
    busy_s: float = 0.0  # the longest time that the loop's thread computed in one go
    health_s: float = 0.0  # the slowest health check
    chunk_s: float = 0.0  # the slowest chunk of a stream, from scheduler to client
    num_checks: int = 0
    num_chunks: int = 0
    codes: dict[str, int] = field(default_factory=dict)


class AttackedGateway:
    """Serves inside `async with`. The scheduler answers only the client whose waits are measured."""

    def __init__(self, *, max_model_len: int) -> None:
        self._max_model_len = max_model_len
        self.http_port = free_port()
        self.address = ""
        self._scheduler = FakeScheduler()

    async def __aenter__(self) -> "AttackedGateway":
        self._server, scheduler_address = await serve(self._scheduler)
        spec = process_pb2.GatewaySpec(
            name="attacked",
            version=__version__,
            server=process_pb2.ServerSection(host="127.0.0.1", http_port=self.http_port),
            model_name="demo",
            model_dir=str(ROOT / "models" / "demo-target"),
            scheduler_addresses=[scheduler_address],
            max_model_len=self._max_model_len,
            vocab_size=4096,
        )
        self._gateway = Gateway(spec)
        self.address = await self._gateway.start()
        self._gateway.open_reader()
        await self._gateway.wait_until_ready()
        await self._wait_for_readers()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._gateway.drain(grace_s=0)
        await self._server.stop(grace=0)

    async def _wait_for_readers(self) -> None:
        """Sends a conversation and a long request; each is refused once the process that reads it has loaded."""
        async with open_channel(self.address) as channel:
            generate = channel.unary_stream("/echelon.v1.Inference/Generate")
            for request in (b"\x22\x00", b"\x0a\x00" * 10_000):
                assert await generate(request).code() == grpc.StatusCode.INVALID_ARGUMENT

    async def attack(self, *, count: int, seed: int, max_bytes: int) -> dict[str, int]:
        """How many calls ended with which status. Raises RuntimeError if the attackers fail."""
        arguments = [self.address, str(self.http_port), str(count), str(seed), str(max_bytes)]
        attackers = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.property.hostile_clients", "--attack", *arguments),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await attackers.communicate()
        if attackers.returncode:
            raise RuntimeError(f"the attackers ended with status {attackers.returncode}")
        return dict(json.loads(out))

    async def observe(self, work: Awaitable[dict[str, int] | None]) -> Report:
        """What the client observes until `work` is done."""
        report = Report()
        async with AsyncClient(self.address) as client, open_channel(self.address) as channel:
            stream = client.stream([5, 6], request_id="watched")
            await self._scheduler.next_submit()  # the gateway drops what is sent before
            reading = asyncio.create_task(self._read(stream, report))
            checking = asyncio.create_task(_check(health_pb2_grpc.HealthStub(channel), report))
            async with PauseMeter() as meter:
                report.codes = await work or {}
            for task in (reading, checking):
                assert not task.done(), "the stream and the checks have gone on"
                task.cancel()
            await asyncio.gather(reading, checking, return_exceptions=True)
            stream.close()
        await self._scheduler.wait_for_cancel("watched")
        self._scheduler.send_complete("watched")
        report.pause_s, report.busy_s = meter.longest_s, meter.busiest_s
        return report

    async def _read(self, stream: AsyncStream, report: Report) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            sent_s = time.perf_counter()
            self._scheduler.send_chunk("watched", [1], "a", offset=report.num_chunks)
            await anext(stream)
            report.chunk_s = max(report.chunk_s, time.perf_counter() - sent_s)
            report.num_chunks += 1


async def _check(health: health_pb2_grpc.HealthStub, report: Report) -> None:
    while True:
        await asyncio.sleep(_INTERVAL_S)
        sent_s = time.perf_counter()
        response = await health.Check(health_pb2.HealthCheckRequest(service="echelon.v1.Inference"))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        report.health_s = max(report.health_s, time.perf_counter() - sent_s)
        report.num_checks += 1
