"""Wires inside a deployment: who has none of its certificates reaches nobody."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from childproc.wires import listen, open_blocking_channel, open_channel
from cluster.authority import Authority
from cluster.errors import StartError
from echelon.pb.process_pb2 import ProcessIdentity


@dataclass
class House:
    authority: Authority
    address: str


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    authority = Authority.create("mine")
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    port = listen(server, "127.0.0.1:0", authority.issue("scheduler-0"))
    await server.start()
    yield House(authority, f"127.0.0.1:{port}")
    await server.stop(grace=None)


async def is_served(channel: grpc.aio.Channel) -> bool:
    async with channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as err:
            return err.code() is not grpc.StatusCode.UNAVAILABLE
    return True


async def test_a_process_of_the_deployment_is_served_by_threads_and_event_loops(house: House, tmp_path: Path) -> None:
    assert await is_served(open_channel(house.address, identity=house.authority.issue("gateway-0")))
    house.authority.save(tmp_path / "authority.pem")
    assert (tmp_path / "authority.pem").stat().st_mode & 0o777 == 0o600
    later = Authority.load(tmp_path / "authority.pem")
    assert await is_served(open_channel(house.address, identity=later.issue("scheduler-1")))


async def test_nobody_else_is_served(house: House) -> None:
    own, other = house.authority.issue("gateway-0"), Authority.create("mine").issue("gateway-0")
    mixed = ProcessIdentity(ca=own.ca, certificate=other.certificate, key=other.key)
    for identity in (None, other, mixed):
        assert not await is_served(open_channel(house.address, identity=identity))
    for credentials in (grpc.ssl_channel_credentials(own.ca), grpc.ssl_channel_credentials(own.ca, None, None)):
        options = (("grpc.ssl_target_name_override", "inside.echelon"),)
        assert not await is_served(grpc.aio.secure_channel(house.address, credentials, options=options))


async def test_nobody_believes_a_stranger_who_listens(house: House) -> None:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    port = listen(server, "127.0.0.1:0", Authority.create("mine").issue("scheduler-0"))
    await server.start()
    assert not await is_served(open_channel(f"127.0.0.1:{port}", identity=house.authority.issue("gateway-0")))
    identity = house.authority.issue("controller")
    with open_blocking_channel(f"127.0.0.1:{port}", identity=identity) as channel, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    await server.stop(grace=None)


def test_a_lost_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"authority\.pem cannot be read"):
        Authority.load(tmp_path / "authority.pem")
