"""A gateway between a client and schedulers, for tests of what outlives either of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from echelon import __version__
from echelon.client import AsyncClient
from echelon.pb import process_pb2, scheduler_pb2
from gateway.server import Gateway
from tests.helpers.fake_scheduler import FakeScheduler, serve

_MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"


@dataclass
class ReplicaHouse:
    gateway: Gateway
    address: str
    client: AsyncClient
    scheduler_addresses: list[str]  # by replica, like these
    schedulers: list[FakeScheduler] = field(default_factory=list)
    servers: list[grpc.aio.Server] = field(default_factory=list)

    @property
    def scheduler(self) -> FakeScheduler:
        """Of the first replica."""
        return self.schedulers[0]

    async def lose_gateway(self) -> None:
        """Its streams break; the schedulers see it leave."""
        await self.gateway.drain(grace_s=0)

    async def start_gateway(self) -> None:
        """Another one at the same address, which knows nothing of what ran."""
        port = int(self.address.rpartition(":")[2])
        self.gateway = Gateway(gateway_spec(*self.scheduler_addresses, grpc_port=port))
        await self.gateway.start()

    async def next_submit(self) -> scheduler_pb2.Submit:
        """What the scheduler gets after a gateway was lost: first that leaves, or its requests are cancelled."""
        while not (request := await self.scheduler.received.get()).HasField("submit"):
            pass
        return request.submit

    async def lose_scheduler(self) -> None:
        await self.servers[0].stop(grace=0)

    async def start_another(self) -> None:
        """In the place of the one that was lost."""
        self.schedulers[0] = FakeScheduler()
        self.servers[0], address = await serve(self.schedulers[0])
        self.scheduler_addresses[0] = address
        self.tell(0, address=address)
        await self.scheduler.streams_opened.acquire()

    async def add(self, **news: Any) -> FakeScheduler:
        scheduler = FakeScheduler()
        server, address = await serve(scheduler)
        self.tell(len(self.schedulers), address=address, **news)
        self.scheduler_addresses.append(address)
        self.schedulers.append(scheduler)
        self.servers.append(server)
        await scheduler.streams_opened.acquire()
        return scheduler

    def tell(self, replica: int, **news: Any) -> None:
        update = process_pb2.SchedulerUpdate(replica=replica, **news)
        self.gateway.on_update(process_pb2.ProcessUpdate(scheduler=update))


def gateway_spec(*scheduler_addresses: str, **server: Any) -> process_pb2.GatewaySpec:
    return process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=process_pb2.ServerSection(host="127.0.0.1", **server),
        model_name="demo",
        model_dir=str(_MODEL_DIR),
        scheduler_addresses=scheduler_addresses,
        max_model_len=64,
        vocab_size=4096,
        keeps_requests=True,
    )


@asynccontextmanager
async def replica_house(**server_section: Any) -> AsyncIterator[ReplicaHouse]:
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    gateway = Gateway(gateway_spec(scheduler_address, **server_section))
    address = await gateway.start()
    await gateway.wait_until_ready()
    async with AsyncClient(address) as client:
        house = ReplicaHouse(gateway, address, client, [scheduler_address], [scheduler], [server])
        yield house
    await house.gateway.drain(grace_s=0)
    for server in house.servers:
        await server.stop(grace=0)
