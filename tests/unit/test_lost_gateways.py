"""Streams whose gateway is lost go on with the next one, as if nothing had happened."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from childproc.wires import open_channel
from echelon.client import Client
from echelon.errors import UnavailableError
from echelon.pb import inference_pb2 as pb
from echelon.pb import inference_pb2_grpc
from echelon.resuming import ResumableRequest
from tests.helpers.replica_house import ReplicaHouse, replica_house

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest_asyncio.fixture
async def house() -> AsyncIterator[ReplicaHouse]:
    async with replica_house() as house:
        yield house


async def test_a_stream_goes_on_at_the_next_gateway(house: ReplicaHouse) -> None:
    stream = house.client.stream([5, 6, 7], n=2, timeout_s=50.0, temperature=1.0)
    reading = asyncio.ensure_future(anext(stream))
    before = await house.scheduler.next_submit()
    house.scheduler.send_chunk(before.request_id, [10, 11], "h\N{LATIN SMALL LETTER E WITH ACUTE}", index=1)
    assert (await reading).index == 1
    resumed = asyncio.ensure_future(anext(stream))
    await house.lose_gateway()
    await house.start_gateway()
    after = await house.next_submit()
    assert (after.request_id, after.sampling) == (before.request_id, before.sampling), "with the seed that was drawn"
    assert [list(sample.token_ids) for sample in after.resume_from.samples] == [[], [10, 11]]
    assert [sample.num_chars for sample in after.resume_from.samples] == [0, 2]
    assert 0 < after.resume_from.first_token_s <= after.resume_from.elapsed_s < 50
    assert not after.was_accepted, "a client cannot pass a full queue"
    house.scheduler.send_chunk(before.request_id, [12], "llo", index=1, offset=2)
    assert (await resumed).text == "llo"
    house.scheduler.send_complete(before.request_id, num_samples=2)
    completion = await stream.result()
    assert completion.samples[1].token_ids == (10, 11, 12)
    assert completion.samples[1].text == "h\N{LATIN SMALL LETTER E WITH ACUTE}llo"


async def test_the_blocking_client_goes_on_too(house: ReplicaHouse) -> None:
    with Client(house.address) as client:
        stream = client.stream([5, 6, 7])
        reading = asyncio.create_task(asyncio.to_thread(next, stream))
        submit = await house.scheduler.next_submit()
        house.scheduler.send_chunk(submit.request_id, [1], "a")
        assert (await reading).text == "a"
        result = asyncio.create_task(asyncio.to_thread(stream.result))
        await house.lose_gateway()
        await house.start_gateway()
        again = await house.next_submit()
        assert [list(sample.token_ids) for sample in again.resume_from.samples] == [[1]]
        house.scheduler.send_chunk(again.request_id, [2], "b", offset=1)
        house.scheduler.send_complete(again.request_id)
        assert (await result).text == "ab"


async def test_a_request_that_waits_in_a_queue_goes_on_too(house: ReplicaHouse) -> None:
    stream = house.client.stream([5, 6, 7])
    reading = asyncio.ensure_future(anext(stream))
    submit = await house.scheduler.next_submit()
    while not stream.request_id:  # noqa: ASYNC110  # until the client knows that it was taken
        await asyncio.sleep(0)
    await house.lose_gateway()
    await house.start_gateway()
    again = await house.next_submit()
    assert (again.request_id, again.sampling.seed) == (submit.request_id, submit.sampling.seed)
    house.scheduler.send_chunk(again.request_id, [1], "a")
    assert (await reading).text == "a"


async def test_a_scheduler_that_is_lost_afterwards_costs_nothing_either(house: ReplicaHouse) -> None:
    """What the client has brought along counts as sent."""
    request = resumption()
    request.resume_from.MergeFrom(pb.Resume(elapsed_s=5.0, first_token_s=2.0))
    async with open_channel(house.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(request, timeout=50)
        await call.read()
        before = await house.scheduler.next_submit()
        assert before.resume_from == request.resume_from
        house.scheduler.send_chunk("r", [11], "x", offset=1)
        await call.read()
        await house.lose_scheduler()
        await house.start_another()
        after = await house.next_submit()
    assert after.was_accepted
    assert list(after.resume_from.samples[0].token_ids) == [10, 11]
    assert after.resume_from.samples[0].num_chars == 4
    assert after.resume_from.first_token_s == pytest.approx(2.0)
    assert after.resume_from.elapsed_s > 5.0
    assert after.timeout_s < before.timeout_s < 51


def resumption() -> pb.GenerateRequest:
    request = pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[5]))
    request.resume_from.samples.add(token_ids=[10], num_chars=3)
    request.sampling.seed = 1
    return request


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda request: request.sampling.ClearField("seed"), "sampling.seed: resume_from needs the seed"),
        (lambda request: request.ClearField("request_id"), "request_id: resume_from needs that of the request"),
        (lambda request: request.resume_from.samples.add(), "resume_from.samples: must be as many as n, 1, got 2"),
    ],
)
async def test_a_senseless_resumption_is_refused(
    house: ReplicaHouse, change: Callable[[pb.GenerateRequest], object], problem: str
) -> None:
    request = resumption()
    change(request)
    async with open_channel(house.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match=problem) as caught:
            await stub.Generate(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_that_nobody_takes_fails_in_the_end(house: ReplicaHouse) -> None:
    with Client(house.address, resume_within_s=0.2) as client:
        stream = client.stream([5, 6, 7])
        reading = asyncio.create_task(asyncio.to_thread(next, stream))
        submit = await house.scheduler.next_submit()
        house.scheduler.send_chunk(submit.request_id, [1], "a")
        await reading
        reading = asyncio.create_task(asyncio.to_thread(next, stream))
        await house.lose_gateway()
        with pytest.raises(UnavailableError):
            await reading


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s


def started_request(clock: Clock, resume_within_s: float = 60.0) -> ResumableRequest:
    request = ResumableRequest(pb.GenerateRequest(), timeout_s=100.0, resume_within_s=resume_within_s, now=clock.now)
    request.on_message(started())
    return request


def started() -> pb.GenerateResponse:
    return pb.GenerateResponse(request_id="r", started=pb.GenerateStarted(seed=7))


def test_attempts_are_made_less_and_less_often_until_the_grace_is_over() -> None:
    clock = Clock()
    request, delays = started_request(clock, resume_within_s=5.0), []
    while (delay_s := request.delay_after(UNAVAILABLE, is_final=False)) is not None:
        delays.append(delay_s)
        clock.now_s += delay_s
    assert delays[:6] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    assert 4.0 < sum(delays) <= 5.0
    assert request.remaining_s() == 100.0 - sum(delays)


@pytest.mark.parametrize("code", [UNAVAILABLE, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_keeps_a_gateway_from_taking_a_lost_request_may_pass(code: grpc.StatusCode) -> None:
    request = started_request(Clock())
    assert request.delay_after(UNAVAILABLE, is_final=False) is not None
    assert request.delay_after(code, is_final=True) is not None
    assert request.delay_after(grpc.StatusCode.INVALID_ARGUMENT, is_final=True) is None


def test_what_a_gateway_says_of_a_running_request_is_final() -> None:
    assert started_request(Clock()).delay_after(UNAVAILABLE, is_final=True) is None
    assert started_request(Clock()).delay_after(grpc.StatusCode.ALREADY_EXISTS, is_final=False) is None


def test_a_request_that_no_gateway_has_taken_is_not_sent_again() -> None:
    request = ResumableRequest(pb.GenerateRequest(), timeout_s=None, resume_within_s=60.0, now=Clock().now)
    assert request.delay_after(UNAVAILABLE, is_final=False) is None


def test_a_request_that_ends_gateways_is_not_passed_on_for_ever() -> None:
    request = started_request(Clock())
    for _ in range(3):
        assert request.delay_after(UNAVAILABLE, is_final=False) is not None
        request.on_message(started())
    assert request.delay_after(UNAVAILABLE, is_final=False) is None
