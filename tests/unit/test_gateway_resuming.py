"""The gateway keeps requests whose scheduler is lost, and gives them to the next one with what their clients have."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from echelon.errors import DeadlineExceededError, EchelonError, UnavailableError
from echelon.pb import inference_pb2 as pb
from tests.helpers.replica_house import ReplicaHouse, replica_house


@pytest_asyncio.fixture
async def house() -> AsyncIterator[ReplicaHouse]:
    async with replica_house() as house:
        yield house


async def test_a_stream_goes_on_where_it_was(house: ReplicaHouse) -> None:
    stream = house.client.stream([5, 6, 7], n=2, request_id="r", timeout_s=50.0)
    first = asyncio.ensure_future(anext(stream))
    before = await house.scheduler.next_submit()
    house.scheduler.send_chunk("r", [10, 11], "h\N{LATIN SMALL LETTER E WITH ACUTE}", index=1)
    assert (await first).index == 1
    await house.lose_scheduler()
    assert await house.client.set_speculation("r", enabled=False)
    await house.start_another()
    after = await house.scheduler.next_submit()
    assert [list(sample.token_ids) for sample in after.resume_from.samples] == [[], [10, 11]]
    assert [sample.num_chars for sample in after.resume_from.samples] == [0, 2]
    assert 0 < after.resume_from.first_token_s <= after.resume_from.elapsed_s
    assert after.timeout_s == pytest.approx(before.timeout_s - after.resume_from.elapsed_s)
    assert (after.sampling, after.prompt_token_ids) == (before.sampling, before.prompt_token_ids)
    assert not after.speculation.enabled, "what the client has changed stays changed"
    house.scheduler.send_chunk("r", [12], "llo", index=1, offset=2)
    house.scheduler.send_complete("r", num_samples=2)
    completion = await stream.result()
    assert completion.samples[1].token_ids == (10, 11, 12)
    assert completion.samples[1].text == "h\N{LATIN SMALL LETTER E WITH ACUTE}llo"


async def test_a_request_whose_client_left_meanwhile_is_forgotten(house: ReplicaHouse) -> None:
    leaving = asyncio.ensure_future(house.client.generate("x", request_id="leaving"))
    staying = asyncio.ensure_future(house.client.generate("x", request_id="staying"))
    for _ in range(2):
        await house.scheduler.next_submit()
    await house.lose_scheduler()
    leaving.cancel()
    cancelled = asyncio.ensure_future(house.client.cancel("staying"))
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await cancelled
    await house.start_another()
    assert (await house.scheduler.next_submit()).request_id == "staying"
    assert await house.scheduler.next_cancel() == "staying", "its client waits for the end"
    house.scheduler.send_complete("staying", reason=pb.FINISH_REASON_ABORT)
    await staying
    assert house.scheduler.received.empty()


async def test_a_request_that_comes_meanwhile_waits(house: ReplicaHouse) -> None:
    running = asyncio.ensure_future(house.client.generate("x", request_id="running"))
    await house.scheduler.next_submit()
    await house.lose_scheduler()
    late = asyncio.ensure_future(house.client.generate("x", request_id="late"))
    await house.start_another()
    submits = [await house.scheduler.next_submit() for _ in range(2)]
    assert {submit.request_id for submit in submits} == {"running", "late"}
    for submit in submits:
        house.scheduler.send_complete(submit.request_id)
    await asyncio.gather(running, late)


async def test_a_request_that_comes_while_the_scheduler_is_silent_waits(
    house: ReplicaHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.replicas.scheduler_link.STATUS_TIMEOUT_S", 0.5)
    house.scheduler.answers = False
    await house.scheduler.asked.acquire()
    async with asyncio.timeout(60):
        while (await house.client.server_info()).num_ready_replicas:
            await house.scheduler.asked.acquire()  # it has not answered the one before
    late = asyncio.ensure_future(house.client.generate("x", request_id="late"))
    house.scheduler.answers = True  # questions that come now; the last one stays without an answer
    assert (await house.scheduler.next_submit()).request_id == "late", "it may only be slow"
    house.scheduler.send_complete("late")
    await late


async def test_a_request_that_comes_at_once_after_the_scheduler_is_back_waits(house: ReplicaHouse) -> None:
    """Before its status was asked for in turn."""
    running = asyncio.ensure_future(house.client.generate("x", request_id="running"))
    await house.scheduler.next_submit()
    for number in range(5):
        await house.lose_scheduler()
        await house.start_another()
        assert (await house.scheduler.next_submit()).request_id == "running"
        late = asyncio.ensure_future(house.client.generate("x", request_id=f"late-{number}"))
        assert (await house.scheduler.next_submit()).request_id == f"late-{number}"
        house.scheduler.send_chunk("running", [number], "x", offset=number)
        house.scheduler.send_complete(f"late-{number}")
        await late
    house.scheduler.send_complete("running")
    await running


async def test_a_request_that_comes_before_a_new_gateway_has_connected_waits(
    house: ReplicaHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.replicas.scheduler_link.STATUS_TIMEOUT_S", 0.5)
    await house.lose_gateway()
    house.scheduler.answers = False
    await house.start_gateway()
    await house.scheduler.asked.acquire()
    early = asyncio.ensure_future(house.client.generate("x", request_id="early"))
    while not await house.client.set_speculation("early", enabled=False):
        assert not early.done(), "it was refused"
    house.scheduler.answers = True
    assert (await house.next_submit()).request_id == "early"
    house.scheduler.send_complete("early")
    await early


async def test_a_request_whose_time_is_over_is_not_sent_again(house: ReplicaHouse) -> None:
    call = asyncio.ensure_future(house.client.generate("x", timeout_s=0.2))
    await house.scheduler.next_submit()
    await house.lose_scheduler()
    with pytest.raises(DeadlineExceededError):
        await call
    await house.start_another()
    assert house.scheduler.received.empty()


async def test_requests_of_a_scheduler_that_is_given_up_fail(house: ReplicaHouse) -> None:
    call = asyncio.ensure_future(house.client.generate("x"))
    await house.scheduler.next_submit()
    await house.lose_scheduler()
    house.tell(0, given_up="five starts failed")
    with pytest.raises(UnavailableError, match="five starts failed"):
        await call


async def test_a_scheduler_that_was_given_up_and_has_a_place_again_serves(house: ReplicaHouse) -> None:
    await house.lose_scheduler()
    house.tell(0, given_up="its target has no place")
    with pytest.raises(UnavailableError):
        await house.client.generate("x")
    await house.start_another()
    call = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    assert (await house.scheduler.next_submit()).request_id == "r"
    await house.lose_scheduler()
    await house.start_another()
    assert (await house.scheduler.next_submit()).request_id == "r", "it is awaited again"
    house.scheduler.send_complete("r")
    await call


async def lose_twice(house: ReplicaHouse, names: set[str]) -> None:
    """The scheduler is lost twice while these run and bring nothing."""
    for _ in range(2):
        assert {(await house.scheduler.next_submit()).request_id for _ in names} == names
        await house.lose_scheduler()
        await house.start_another()


async def test_a_request_that_ends_its_scheduler_each_time_fails_and_no_other(house: ReplicaHouse) -> None:
    calls = {name: asyncio.ensure_future(house.client.generate("x", request_id=name)) for name in ("a", "b")}
    await lose_twice(house, {"a", "b"})
    guilty = (await house.scheduler.next_submit()).request_id
    assert house.scheduler.received.empty(), "one at a time"
    await house.lose_scheduler()
    with pytest.raises(EchelonError, match=f"INTERNAL: the scheduler was lost 3 times while request '{guilty}' ran"):
        await calls[guilty]
    await house.start_another()
    other = (await house.scheduler.next_submit()).request_id
    assert {guilty, other} == {"a", "b"}
    house.scheduler.send_complete(other)
    await calls[other]


async def test_a_suspect_that_brings_something_is_none(house: ReplicaHouse) -> None:
    calls = {name: asyncio.ensure_future(house.client.generate("x", request_id=name)) for name in ("a", "b")}
    await lose_twice(house, {"a", "b"})
    first = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(first, [1], "x")
    second = (await house.scheduler.next_submit()).request_id
    assert {first, second} == {"a", "b"}
    await house.lose_scheduler()
    await house.start_another()
    assert (await house.scheduler.next_submit()).request_id == first
    house.scheduler.send_complete(first)
    await calls[first]
    with pytest.raises(EchelonError, match=f"request '{second}' ran"):
        await calls[second]
