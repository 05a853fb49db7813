"""The gateway's Control service, between its client and a scheduler that the test plays."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from echelon import __version__
from echelon.client import AsyncClient
from echelon.control import ControlClient
from echelon.errors import EchelonError, InvalidRequestError, UnavailableError
from echelon.pb import process_pb2
from echelon.pb.scheduler_pb2 import SchedulerStatus, TracedRound, TraceEvent
from gateway.server import Gateway
from tests.helpers.fake_scheduler import FakeScheduler, serve

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"


@dataclass
class House:
    address: str
    gateway: Gateway
    scheduler: FakeScheduler
    scheduler_server: grpc.aio.Server
    client: ControlClient

    async def trace(self, **limits: Any) -> list[TraceEvent]:
        return await asyncio.to_thread(lambda: list(self.client.trace(**limits)))


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    spec = process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=process_pb2.ServerSection(host="127.0.0.1"),
        model_name="demo",
        model_dir=str(MODEL_DIR),
        scheduler_addresses=[scheduler_address, "127.0.0.1:1"],
        max_model_len=64,
        vocab_size=4096,
    )
    gateway = Gateway(spec)
    address = await gateway.start()
    await gateway.wait_until_ready()
    with ControlClient(address) as client:
        yield House(address, gateway, scheduler, server, client)
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


async def test_the_status_of_replicas_is_asked_anew(house: House) -> None:
    house.scheduler.status = SchedulerStatus(num_requests_running=3)
    answer = await asyncio.to_thread(house.client.replicas)
    assert answer.model == "demo"
    first, second = answer.replicas
    assert (first.replica, first.status.ready, first.status.num_requests_running) == (0, True, 3)
    assert (second.replica, second.address, second.HasField("status")) == (1, "127.0.0.1:1", False)
    assert second.error.startswith("UNAVAILABLE: ")


async def test_a_trace_is_passed_through(house: House) -> None:
    house.scheduler.trace = [TraceEvent(round=TracedRound(round_id=i)) for i in range(3)]
    events = await house.trace(num_rounds=3, duration_s=2.5)
    assert [event.round.round_id for event in events] == [0, 1, 2]
    (asked,) = house.scheduler.traces_asked
    assert (asked.num_rounds, asked.duration_s) == (3, 2.5)


async def test_the_message_of_a_scheduler_that_refuses_to_record_arrives(house: House) -> None:
    house.scheduler.trace = None
    with pytest.raises(EchelonError, match=r"^FAILED_PRECONDITION: another recording runs"):
        await house.trace()


async def test_a_gateway_that_stops_ends_a_recording(house: House) -> None:
    house.scheduler.trace = [TraceEvent(), TraceEvent()]
    events = house.client.trace()
    assert await asyncio.to_thread(next, events) == TraceEvent()
    draining = asyncio.ensure_future(house.gateway.drain(grace_s=60))
    with pytest.raises(UnavailableError, match="shutting down"):
        await asyncio.to_thread(list, events)
    await draining


async def test_a_gateway_that_stops_begins_no_recording(house: House) -> None:
    async with AsyncClient(house.address) as client:
        running = asyncio.ensure_future(client.generate("x", request_id="r"))
        await house.scheduler.next_submit()
        draining = asyncio.ensure_future(house.gateway.drain(grace_s=60))
        with pytest.raises(UnavailableError, match="shutting down"):
            await house.trace()
        house.scheduler.send_complete("r")
        await running
    await draining
    assert not house.scheduler.traces_asked


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"replica": 2}, "replica: there is no 2; the last one is 1"),
        ({"num_rounds": 1_000_001}, r"trace\.num_rounds: must be at most 1000000, got 1000001"),
        ({"duration_s": 601}, r"trace\.duration_s: must be in \[0, 600\], got 601"),
        ({"duration_s": -1}, r"trace\.duration_s: "),
        ({"duration_s": float("nan")}, r"trace\.duration_s: "),
    ],
)
async def test_limits_of_a_trace(house: House, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await house.trace(**limits)
