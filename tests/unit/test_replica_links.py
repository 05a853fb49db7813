"""Replicas come and go while a gateway serves: nothing that runs is lost."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from childproc.block_digests import DigestChain, root_digest, short_digest
from childproc.wires import open_channel
from echelon.client import AsyncClient
from echelon.errors import InvalidRequestError, OverloadedError, UnavailableError
from echelon.pb import control_pb2, control_pb2_grpc, scheduler_pb2
from gateway.server import Gateway
from tests.helpers.replica_house import ReplicaHouse, gateway_spec, replica_house


@pytest_asyncio.fixture
async def house() -> AsyncIterator[ReplicaHouse]:
    async with replica_house() as house:
        yield house


async def num_ready(house: ReplicaHouse) -> int:
    return (await house.client.server_info()).num_ready_replicas


async def until_ready(house: ReplicaHouse, number: int) -> None:
    async with asyncio.timeout(20):
        while await num_ready(house) != number:
            pass


async def test_a_new_replica_gets_requests_as_soon_as_it_is_ready(house: ReplicaHouse) -> None:
    busy = asyncio.ensure_future(house.client.generate("x", request_id="first"))
    await house.schedulers[0].next_submit()
    second = await house.add()
    await until_ready(house, 2)
    other = asyncio.ensure_future(house.client.generate("y", request_id="other"))
    assert (await second.next_submit()).request_id == "other", "it has fewer"
    house.schedulers[0].send_complete("first")
    second.send_complete("other")
    await asyncio.gather(busy, other)


async def test_a_replica_that_retires_finishes_what_it_has_and_gets_nothing_new(house: ReplicaHouse) -> None:
    second = await house.add()
    await until_ready(house, 2)
    on_first = asyncio.ensure_future(house.client.generate("x", request_id="on-first"))
    await house.schedulers[0].next_submit()
    on_second = asyncio.ensure_future(house.client.generate("x", request_id="on-second"))
    await second.next_submit()
    house.tell(1, retiring=True)
    assert await num_ready(house) == 1
    more = [asyncio.ensure_future(house.client.generate("x", request_id=f"more-{number}")) for number in range(2)]
    for _ in more:
        assert (await house.schedulers[0].next_submit()).request_id.startswith("more-")
    second.send_chunk("on-second", [7], "done")
    second.send_complete("on-second")
    assert (await on_second).text == "done"
    house.tell(1, removed=True)
    for request_id in ("on-first", "more-0", "more-1"):
        house.schedulers[0].send_complete(request_id)
    await asyncio.gather(on_first, *more)
    assert (await house.client.server_info()).num_replicas == 1


async def test_what_runs_on_a_replica_that_is_removed_goes_on_at_another(house: ReplicaHouse) -> None:
    second = await house.add()
    await until_ready(house, 2)
    kept = house.client.stream("x", request_id="kept")
    kept_first = asyncio.ensure_future(anext(kept))
    await house.schedulers[0].next_submit()
    house.schedulers[0].send_chunk("kept", [1], "k")
    await kept_first
    stream = house.client.stream("x", request_id="moved")
    first = asyncio.ensure_future(anext(stream))
    await second.next_submit()
    second.send_chunk("moved", [10, 11], "he")
    await first
    house.tell(1, retiring=True)
    house.tell(1, removed=True)
    again = await house.schedulers[0].next_submit()
    assert again.request_id == "moved"
    assert [list(sample.token_ids) for sample in again.resume_from.samples] == [[10, 11]]
    second.send_chunk("moved", [66], "not from there any more")
    house.schedulers[0].send_chunk("moved", [12], "llo", offset=2)
    house.schedulers[0].send_complete("moved")
    completion = await stream.result()
    assert (completion.text, completion.token_ids) == ("hello", (10, 11, 12))
    assert await house.client.cancel("kept"), "it is where it was"
    assert await house.schedulers[0].next_cancel() == "kept"


async def test_a_client_that_leaves_after_a_move_cancels_where_its_request_is(house: ReplicaHouse) -> None:
    await house.add()
    await until_ready(house, 2)
    other = asyncio.ensure_future(house.client.generate("x", request_id="other"))
    await house.schedulers[0].next_submit()
    stream = house.client.stream("x", request_id="moved")
    reading = asyncio.ensure_future(anext(stream))
    await house.schedulers[1].next_submit()
    house.tell(1, removed=True)
    await house.schedulers[0].next_submit()
    stream.close()
    assert await house.schedulers[0].next_cancel() == "moved"
    house.schedulers[0].send_complete("other")
    await other
    reading.cancel()


async def test_without_another_replica_the_requests_end(house: ReplicaHouse) -> None:
    running = asyncio.ensure_future(house.client.generate("x"))
    await house.schedulers[0].next_submit()
    house.tell(0, removed=True)
    with pytest.raises(UnavailableError, match="its replica was removed, and no other accepts requests"):
        await running


async def test_operators_see_the_replicas_that_are_there(house: ReplicaHouse) -> None:
    await house.add()
    async with open_channel(house.address) as channel:
        stub: Any = control_pb2_grpc.ControlStub(channel)
        listed = await stub.GetReplicas(control_pb2.GetReplicasRequest())
        assert [replica.replica for replica in listed.replicas] == [0, 1]
        house.tell(1, removed=True)
        house.tell(7, retiring=True)  # there is none
        listed = await stub.GetReplicas(control_pb2.GetReplicasRequest())
        assert [replica.replica for replica in listed.replicas] == [0]


def digests_of(prompt: list[int]) -> list[int]:
    return [short_digest(d) for d in DigestChain(root_digest("demo", 4), 4).extend(prompt, len(prompt) // 4)]


async def test_a_prompt_goes_to_the_replica_that_reports_its_beginning(house: ReplicaHouse) -> None:
    second = await house.add()
    await until_ready(house, 2)
    prompt = list(range(1, 20))
    busy = asyncio.ensure_future(house.client.generate([9], request_id="busy"))
    await house.schedulers[0].next_submit()
    other = asyncio.ensure_future(house.client.generate([9], request_id="other"))
    await second.next_submit()
    second.send_cache(digests_of(prompt[:12]), from_nothing=True)
    second.send_complete("other")  # comes after the report
    house.schedulers[0].send_complete("busy")
    await asyncio.gather(other, busy)
    for number in range(2):
        running = asyncio.ensure_future(house.client.generate(prompt, request_id=f"hit-{number}"))
        assert (await second.next_submit()).request_id == f"hit-{number}"
        second.send_cache([], removed=digests_of(prompt[:12]) if number else [])
        second.send_complete(f"hit-{number}")
        await running
    miss = asyncio.ensure_future(house.client.generate(prompt, request_id="miss"))
    assert (await house.schedulers[0].next_submit()).request_id == "miss", "it has had fewer"
    house.schedulers[0].send_complete("miss")
    await miss


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
async def test_what_one_replica_refuses_another_gets(house: ReplicaHouse, code: grpc.StatusCode) -> None:
    second = await house.add()
    await until_ready(house, 2)
    running = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.schedulers[0].next_submit()
    house.schedulers[0].send_error("r", code, "the queue is full")
    again = await second.next_submit()
    assert again.request_id == "r"
    assert not again.HasField("resume_from"), "it waits in the queue like any other"
    second.send_chunk("r", [5], "yes")
    second.send_complete("r")
    assert (await running).text == "yes"


async def test_what_every_replica_refuses_fails_with_the_last_reason(house: ReplicaHouse) -> None:
    second = await house.add()
    await until_ready(house, 2)
    running = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.schedulers[0].next_submit()
    house.schedulers[0].send_error("r", grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full here")
    await second.next_submit()
    second.send_error("r", grpc.StatusCode.RESOURCE_EXHAUSTED, "and there")
    with pytest.raises(OverloadedError, match="and there"):
        await running


async def test_a_stream_whose_replica_is_given_up_goes_on_at_another(house: ReplicaHouse) -> None:
    second = await house.add()
    await until_ready(house, 2)
    stream = house.client.stream("x", request_id="r")
    first = asyncio.ensure_future(anext(stream))
    await house.schedulers[0].next_submit()
    house.schedulers[0].send_chunk("r", [10], "he")
    await first
    house.schedulers[0].send_error("r", grpc.StatusCode.UNAVAILABLE, "target group: given up")
    again = await second.next_submit()
    assert [list(sample.token_ids) for sample in again.resume_from.samples] == [[10]]
    second.send_chunk("r", [11], "llo", offset=1)
    second.send_complete("r")
    assert (await stream.result()).text == "hello"


async def test_a_refusal_that_another_replica_would_repeat_is_final(house: ReplicaHouse) -> None:
    await house.add()
    await until_ready(house, 2)
    running = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.schedulers[0].next_submit()
    house.schedulers[0].send_error("r", grpc.StatusCode.INVALID_ARGUMENT, "prompt_token_ids: too long")
    with pytest.raises(InvalidRequestError, match="too long"):
        await running


async def test_a_drained_replica_gets_requests_again(house: ReplicaHouse) -> None:
    house.tell(0, retiring=True)
    with pytest.raises(UnavailableError, match="it is being drained"):
        await house.client.generate("x")
    house.tell(0, retiring=False)
    await until_ready(house, 1)
    running = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.schedulers[0].next_submit()
    house.schedulers[0].send_complete("r")
    await running


async def test_a_gateway_of_a_drained_deployment_starts_and_takes_nothing(house: ReplicaHouse) -> None:
    await house.lose_gateway()
    house.gateway = Gateway(gateway_spec(*house.scheduler_addresses))
    house.tell(0, retiring=True)
    async with AsyncClient(await house.gateway.start()) as client:
        await house.gateway.wait_until_ready()
        with pytest.raises(UnavailableError, match="no scheduler is ready"):
            await client.generate("x")


async def test_a_scheduler_that_hung_is_ready_again_elsewhere(house: ReplicaHouse) -> None:
    hung, hung_server = house.scheduler, house.servers[0]
    hung.answers = False
    await hung.asked.acquire()
    await house.start_another()
    async with asyncio.timeout(20):
        await until_ready(house, 1)
        running = asyncio.ensure_future(house.client.generate("x", request_id="r"))
        await house.scheduler.next_submit()
        house.scheduler.send_complete("r")
        await running
        house.scheduler.ready = False
        await until_ready(house, 0)
    await hung_server.stop(grace=0)


async def test_a_recording_ends_with_its_scheduler_and_says_so(house: ReplicaHouse) -> None:
    first_server, house.scheduler.trace = house.servers[0], [scheduler_pb2.TraceEvent()]
    async with open_channel(house.address) as channel:
        stub: Any = control_pb2_grpc.ControlStub(channel)
        call = stub.Trace(control_pb2.ReplicaTraceRequest())
        await call.read()
        await house.start_another()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the scheduler was started again"
    await first_server.stop(grace=0)
