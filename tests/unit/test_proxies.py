"""Our own connections never go through the proxies that the environment names."""

import asyncio
from pathlib import Path

import grpc
import pytest

from childproc.wires import open_channel
from echelon import __version__
from echelon.channel import channel_options
from echelon.client import AsyncClient, Client
from echelon.control import ControlClient
from echelon.pb import process_pb2, scheduler_pb2, scheduler_pb2_grpc
from gateway.server import Gateway
from scheduler.process.server import SchedulerServer
from tests.helpers.fake_group import FakeEngine
from tests.helpers.fake_group_server import FakeGroupServer
from tests.helpers.fake_scheduler import FakeScheduler, serve
from tests.helpers.proxies import set_proxies

ROOT = Path(__file__).parents[2]
MODEL_DIR = ROOT / "models" / "demo-target"


@pytest.fixture(autouse=True)
def _proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    set_proxies(monkeypatch)


async def test_clients_reach_a_gateway_of_this_machine_and_it_reaches_its_scheduler() -> None:
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    gateway = Gateway(
        process_pb2.GatewaySpec(
            server=process_pb2.ServerSection(host="127.0.0.1"),
            model_dir=str(MODEL_DIR),
            scheduler_addresses=[scheduler_address],
            max_model_len=64,
            vocab_size=4096,
        )
    )
    address = await gateway.start()
    await gateway.wait_until_ready()
    async with AsyncClient(address) as client:
        assert (await client.server_info()).num_ready_replicas == 1
    with Client(address.replace("127.0.0.1", "localhost")) as blocking:
        assert (await asyncio.to_thread(blocking.server_info)).num_ready_replicas == 1
    with ControlClient(address) as control:
        assert len((await asyncio.to_thread(control.replicas)).replicas) == 1
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


async def test_a_scheduler_reaches_its_group() -> None:
    group = FakeGroupServer(FakeEngine(), version=__version__)
    server = SchedulerServer(
        process_pb2.SchedulerSpec(
            host="127.0.0.1",
            version=__version__,
            tokenizer_dir=str(MODEL_DIR),
            target=process_pb2.GroupEndpoint(address=await group.start(), incarnation=1),
            scheduler=process_pb2.SchedulerSection(
                max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, max_queue=4
            ),
            max_rounds_in_flight=2,
        )
    )
    async with open_channel(await server.start(10.0)) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        assert (await stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())).ready
    await server.stop(0)
    await group.stop()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "localhost:1", "LOCALHOST:1", "0.0.0.0:1", "dns:///localhost:1",
     "dns:localhost:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"],
)  # fmt: skip
def test_this_machine_is_reached_directly(address: str) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options(address)


@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.org:1", "localhost.example.org:1", "[2001:db8::1]:1"])
def test_others_may_be_behind_a_proxy(address: str) -> None:
    assert channel_options(address, ("grpc.keepalive_time_ms", 1)) == (("grpc.keepalive_time_ms", 1),)


def test_the_variables_do_break_a_channel_that_obeys_them() -> None:
    """Otherwise the tests above would prove nothing."""
    channel = grpc.insecure_channel("127.0.0.1:2")
    with pytest.raises(grpc.RpcError) as err:
        channel.unary_unary("/x/y")(b"", timeout=10)
    channel.close()
    assert "127.0.0.1:1" in err.value.details()  # type: ignore[attr-defined]
