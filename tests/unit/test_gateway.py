"""The gateway over loopback, between a real client and a scheduler that the test plays."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from childproc.wires import open_channel
from echelon import __version__
from echelon.client import AsyncClient
from echelon.errors import (
    DeadlineExceededError,
    EchelonError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from echelon.pb import inference_pb2 as pb
from echelon.pb import process_pb2, sampling_pb2
from gateway.replicas import scheduler_link
from gateway.replicas.mailbox import Mailbox
from gateway.server import Gateway, StartupError
from tests.helpers.fake_scheduler import FakeScheduler, serve

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
GENERATE = "/echelon.v1.Inference/Generate"


@dataclass
class House:
    scheduler: FakeScheduler
    scheduler_server: grpc.aio.Server
    scheduler_address: str
    gateway: Gateway
    address: str
    client: AsyncClient
    channel: grpc.aio.Channel

    async def health(self, service: str) -> str:
        stub = health_pb2_grpc.HealthStub(self.channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def gateway_spec(scheduler_address: str, **fields: Any) -> process_pb2.GatewaySpec:
    spec = process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=process_pb2.ServerSection(host="127.0.0.1"),
        model_name="demo",
        model_dir=str(MODEL_DIR),
        scheduler_addresses=[scheduler_address],
        max_model_len=64,
        max_message_bytes=1 << 20,
        vocab_size=4096,
    )
    spec.MergeFrom(process_pb2.GatewaySpec(**fields))
    return spec


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    gateway = Gateway(gateway_spec(scheduler_address))
    address = await gateway.start()
    await gateway.wait_until_ready()
    channel = open_channel(address)
    async with AsyncClient(address) as client:
        yield House(scheduler, server, scheduler_address, gateway, address, client, channel)
    await channel.close()
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


async def test_streams_chunks_as_they_come_and_then_the_completion(house: House) -> None:
    stream = house.client.stream([5, 6, 7], temperature=0, max_tokens=9, request_id="r1")
    first = asyncio.ensure_future(anext(stream))
    submit = await house.scheduler.next_submit()
    assert list(submit.prompt_token_ids) == [5, 6, 7]
    assert submit.sampling.max_tokens == 9
    house.scheduler.send_chunk("r1", [10, 11], "he", offset=0)
    assert (await first).text == "he"  # it arrived before anything else was sent
    house.scheduler.send_chunk("r1", [12], "llo", offset=2)
    house.scheduler.send_complete("r1")
    completion = await stream.result()
    assert (completion.text, completion.token_ids) == ("hello", (10, 11, 12))
    assert completion.finish_reason == "length"
    assert completion.speculation.num_accepted_tokens == 1
    assert (completion.request_id, completion.seed) == ("r1", 7)


async def test_samples_of_one_request_are_kept_apart(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x", n=2))
    request_id = (await house.scheduler.next_submit()).request_id
    for index, token_ids, text in ((0, [1], "a"), (1, [2], "b"), (0, [3], "c"), (1, [4], "d")):
        house.scheduler.send_chunk(request_id, token_ids, text, index=index)
    house.scheduler.send_complete(request_id, num_samples=2)
    completion = await call
    assert [(s.index, s.text, s.token_ids) for s in completion.samples] == [(0, "ac", (1, 3)), (1, "bd", (2, 4))]


async def test_scheduler_errors_keep_their_status(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x"))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_error(request_id, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full (8)")
    with pytest.raises(OverloadedError, match=r"RESOURCE_EXHAUSTED: the queue is full \(8\)"):
        await call


async def test_a_dropped_stream_cancels_and_frees_its_id(house: House) -> None:
    stream = house.client.stream("x", request_id="dropped")
    reading = asyncio.ensure_future(anext(stream))
    await house.scheduler.next_submit()
    house.scheduler.send_chunk("dropped", [1], "a")
    await reading
    stream.close()
    assert await house.scheduler.next_cancel() == "dropped"
    # Until the scheduler reports the end of the old request, a new one with its id would receive the old one's tokens.
    with pytest.raises(InvalidRequestError, match="ALREADY_EXISTS: request_id: 'dropped'"):
        await house.client.generate("x", request_id="dropped")
    house.scheduler.send_chunk("dropped", [2], "late")
    house.scheduler.send_complete("dropped", reason=pb.FINISH_REASON_ABORT)
    again = asyncio.ensure_future(house.client.generate("y", request_id="other"))
    assert (await house.scheduler.next_submit()).request_id == "other"
    house.scheduler.send_complete("other")
    await again
    again = asyncio.ensure_future(house.client.generate("y", request_id="dropped"))
    assert (await house.scheduler.next_submit()).request_id == "dropped"
    house.scheduler.send_complete("dropped")
    assert (await again).text == ""


async def test_a_stream_that_is_garbage_collected_cancels(house: House) -> None:
    stream = house.client.stream("x", request_id="forgotten")
    reading = asyncio.ensure_future(anext(stream))
    await house.scheduler.next_submit()
    house.scheduler.send_chunk("forgotten", [1], "a")
    await reading
    del stream, reading
    assert await house.scheduler.next_cancel() == "forgotten"


async def test_cancel_rpc_ends_the_stream_with_abort(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.scheduler.next_submit()
    assert await house.client.cancel("r")
    assert await house.scheduler.next_cancel() == "r"
    house.scheduler.send_complete("r", reason=pb.FINISH_REASON_ABORT)
    assert (await call).finish_reason == "abort"
    assert not await house.client.cancel("r")
    with pytest.raises(InvalidRequestError, match="request_id"):
        await house.client.cancel("")


async def test_speculation_settings_reach_the_scheduler_of_their_request(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.scheduler.next_submit()
    assert await house.client.set_speculation("r", num_speculative_tokens=2)
    adjust = await house.scheduler.next_adjust()
    assert (adjust.request_id, adjust.speculation) == ("r", pb.Speculation(num_speculative_tokens=2))
    house.scheduler.send_complete("r")
    await call
    assert not await house.client.set_speculation("r", enabled=False)
    assert house.scheduler.received.empty()
    with pytest.raises(InvalidRequestError, match="request_id"):
        await house.client.set_speculation("", enabled=False)


async def test_a_deadline_travels_as_remaining_time_and_cancels(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x", timeout_s=0.5))
    submit = await house.scheduler.next_submit()
    assert 0 < submit.timeout_s < 0.6  # grpc rounds the timeout in its own way
    with pytest.raises(DeadlineExceededError):
        await call
    assert await house.scheduler.next_cancel() == submit.request_id


async def test_no_deadline_is_no_timeout(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x"))
    submit = await house.scheduler.next_submit()
    assert not submit.HasField("timeout_s")
    house.scheduler.send_complete(submit.request_id)
    await call


async def test_a_running_id_is_refused(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.scheduler.next_submit()
    with pytest.raises(EchelonError, match=r"ALREADY_EXISTS.*'r'"):
        await house.client.generate("x", request_id="r")
    house.scheduler.send_complete("r")
    await call


async def test_a_client_that_does_not_read_delays_nobody(house: House) -> None:
    slow = house.client.stream("slow", request_id="slow")
    reading = asyncio.ensure_future(anext(slow))
    await house.scheduler.next_submit()
    text = "x" * 20_000
    house.scheduler.send_chunk("slow", [0], text)
    await reading
    for i in range(1, 600):  # 12 MB, more than grpc keeps on its way
        house.scheduler.send_chunk("slow", [i], text, offset=i)
    quick = asyncio.ensure_future(house.client.generate("quick", request_id="quick"))
    await house.scheduler.next_submit()
    house.scheduler.send_chunk("quick", [1], "done")
    house.scheduler.send_complete("quick")
    assert (await quick).text == "done"
    house.scheduler.send_complete("slow")
    rest = [chunk async for chunk in slow]
    assert len(rest) < 599  # chunks that waited for the client were merged
    completion = await slow.result()
    assert completion.token_ids == tuple(range(600))
    assert len(completion.text) == 600 * len(text)


async def test_a_mailbox_holds_one_chunk_for_each_sample() -> None:
    mailbox = Mailbox(asyncio.Event())
    position = sampling_pb2.PositionLogprobs(chosen=sampling_pb2.TokenLogprob(token_id=1))
    for offset, (index, text) in enumerate([(0, "a"), (1, "x"), (0, "b"), (0, ""), (1, "y")]):
        mailbox.put(pb.GenerateChunk(index=index, token_ids=[offset], text=text, logprobs=[position], offset=offset))
    chunks, final = mailbox.take()
    assert final is None
    assert [(c.index, list(c.token_ids), c.text, len(c.logprobs), c.offset) for c in chunks] == [
        (0, [0, 2, 3], "ab", 3, 0),
        (1, [1, 4], "xy", 2, 1),
    ]
    mailbox.put(pb.GenerateChunk(token_ids=[9]))
    mailbox.finish(pb.GenerateComplete(seed=3))
    chunks, final = mailbox.take()
    assert [list(c.token_ids) for c in chunks] == [[9]]
    assert final == pb.GenerateComplete(seed=3)


async def test_a_lost_scheduler_ends_requests_and_health_reports_it(house: House) -> None:
    watch = health_pb2_grpc.HealthStub(house.channel).Watch(
        health_pb2.HealthCheckRequest(service="echelon.v1.Inference")
    )
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    call = asyncio.ensure_future(house.client.generate("x"))
    await house.scheduler.next_submit()
    await house.scheduler_server.stop(grace=0)
    with pytest.raises(UnavailableError, match=r"connection to scheduler 127\.0\.0\.1:.* was lost"):
        await call
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(UnavailableError, match="no scheduler is ready"):
        await house.client.generate("x")
    assert await house.health("") == "SERVING"  # the gateway itself is alive

    house.scheduler_server, _ = await serve(house.scheduler, port=int(house.scheduler_address.split(":")[1]))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    call = asyncio.ensure_future(house.client.generate("x"))
    house.scheduler.send_complete((await house.scheduler.next_submit()).request_id)
    await call
    await house.scheduler_server.stop(grace=0)


async def test_health_follows_the_target_group_and_errors_say_why(house: House) -> None:
    watch = health_pb2_grpc.HealthStub(house.channel).Watch(
        health_pb2.HealthCheckRequest(service="echelon.v1.Inference")
    )
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    house.scheduler.ready, house.scheduler.not_ready_reason = False, "target rank 1 died"
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(UnavailableError, match="target rank 1 died"):
        await house.client.generate("x")
    assert (await house.client.server_info()).num_ready_replicas == 0
    house.scheduler.ready = True
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING


async def test_health_of_an_unknown_service(house: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await house.health("echelon.v1.Nothing")
    assert err.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(house: House) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(house.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for response in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in response.list_services_response.service}
    assert {"echelon.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_infos(house: House) -> None:
    model = await house.client.model_info()
    assert (model.model, model.max_model_len, model.vocab_size) == ("demo", 64, 4096)
    assert (model.eos_token_ids, model.has_chat_template) == ((0,), True)
    server = await house.client.server_info()
    assert (server.num_replicas, server.num_ready_replicas) == (1, 1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x1a\x02\xff\xfe", "text: invalid UTF-8 at byte 0"),
        (b"\x22\x0a\x0a\x02\x0a\x00\x0a\x04\x12\x02a\xff", r"chat.messages\[1\].content: invalid UTF-8 at byte 1"),
        (b"\x1a\x01a\x32\x07\xfa\x06\x04abcd", "sampling: unknown field number 111; .*temperature=1"),
        (b"\x1a\x01a\x3a\x02\x50\x01", "speculation: unknown field number 10"),
        (b"\x1a\x7f\x01", "not a echelon.v1.GenerateRequest message"),
        (b"", "input: one of text, chat and token_ids is needed"),
    ],
)
async def test_malformed_bytes_name_the_field(house: House, raw: bytes, message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=message) as err:
        async for _ in house.channel.unary_stream(GENERATE)(raw):
            pass
    assert err.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_oversized_message_is_refused(house: House) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"the request has 20971\d\d bytes, and this .* at most 1048576; send a"
    ):
        await house.client.generate("x" * (2 << 20))


@pytest.mark.parametrize(("max_model_len", "most_mib"), [(1 << 18, 8), (1 << 20, 16), (1 << 22, 32)])
async def test_the_size_of_a_request_follows_the_context(house: House, max_model_len: int, most_mib: int) -> None:
    """At least 8 bytes a token. What is refused for its content has been received."""
    spec = gateway_spec(house.scheduler_address, max_model_len=max_model_len)
    spec.max_message_bytes = 0
    gateway = Gateway(spec)
    address = await gateway.start()
    async with open_channel(address, ("grpc.max_send_message_length", -1)) as channel:
        for num_bytes, words in (
            (most_mib << 20, "unknown field number 111"),
            (1 + (most_mib << 20), "larger than max"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=words):
                async for _ in channel.unary_stream(GENERATE)(unknown_field(num_bytes)):
                    pass
    await gateway.drain(grace_s=0)


def unknown_field(num_bytes: int) -> bytes:
    """A message of that length, over 2 MiB, with nothing but field 111."""
    size = num_bytes - 6
    length = bytes((size >> shift) & 0x7F | (0x80 if shift < 21 else 0) for shift in (0, 7, 14, 21))
    return b"\xfa\x06" + length + bytes(size)


async def test_another_model_is_not_found(house: House) -> None:
    with pytest.raises(NotFoundError, match="'llama' is not served here; this server has 'demo'"):
        await house.client.generate("x", model="llama")


async def test_a_taken_port_is_named(house: House) -> None:
    port = int(house.address.split(":")[1])
    second = Gateway(gateway_spec(house.scheduler_address, server={"grpc_port": port}))
    with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port} is taken.*server\.grpc_port"):
        await second.start()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"server": {"host": "192.0.2.1"}},
            r"cannot listen on 192\.0\.2\.1:0 .*server\.host",
        ),  # an address reserved for documentation
        ({"model_dir": "/nowhere"}, "model_dir: /nowhere is not a folder"),
    ],
)
async def test_an_unusable_spec_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        await Gateway(gateway_spec("127.0.0.1:1", **fields)).start()


async def test_listens_on_ipv6() -> None:
    gateway = Gateway(gateway_spec("127.0.0.1:1", server={"host": "::1"}))
    try:
        address = await gateway.start()
    except StartupError:
        pytest.skip("no IPv6 on this machine")
    async with AsyncClient(address) as client:
        assert (await client.server_info()).num_ready_replicas == 0
    await gateway.drain(grace_s=0)


async def test_draining_finishes_what_runs_and_refuses_the_rest(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x", request_id="running"))
    await house.scheduler.next_submit()
    watch = health_pb2_grpc.HealthStub(house.channel).Watch(
        health_pb2.HealthCheckRequest(service="echelon.v1.Inference")
    )
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    draining = asyncio.ensure_future(house.gateway.drain(grace_s=60))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(UnavailableError, match="shutting down"):
        await house.client.generate("new")
    house.scheduler.send_chunk("running", [1], "end")
    house.scheduler.send_complete("running")
    assert (await call).text == "end"
    await draining


async def serving_again(house: House) -> None:
    watch = health_pb2_grpc.HealthStub(house.channel).Watch(
        health_pb2.HealthCheckRequest(service="echelon.v1.Inference")
    )
    while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
        pass


async def test_a_stream_that_the_scheduler_closes_is_opened_again(house: House) -> None:
    call = asyncio.ensure_future(house.client.generate("x"))
    await house.scheduler.next_submit()
    await house.scheduler.streams_opened.acquire()  # the first
    house.scheduler.drop_stream()
    with pytest.raises(UnavailableError, match="the scheduler closed the stream"):
        await call
    with pytest.raises(UnavailableError, match="no scheduler is ready"):
        await house.client.generate("x")
    await house.scheduler.streams_opened.acquire()
    await serving_again(house)
    call = asyncio.ensure_future(house.client.generate("x"))
    house.scheduler.send_complete((await house.scheduler.next_submit()).request_id)
    await call


async def test_a_scheduler_that_falls_silent_ends_its_requests(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_link, "STATUS_TIMEOUT_S", 0.05)
    call = asyncio.ensure_future(house.client.generate("x", request_id="r"))
    await house.scheduler.next_submit()
    await house.scheduler.streams_opened.acquire()
    house.scheduler.answers = False
    with pytest.raises(
        UnavailableError, match=r"the connection to scheduler .* was lost \(it does not answer\); try again"
    ):
        await call
    assert await house.health("echelon.v1.Inference") == "NOT_SERVING"
    with pytest.raises(UnavailableError, match="no scheduler is ready"):
        await house.client.generate("x")
    house.scheduler.answers = True
    await house.scheduler.streams_opened.acquire()
    await serving_again(house)


async def test_a_scheduler_that_streams_is_not_silent(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to answer a status question."""
    monkeypatch.setattr(scheduler_link, "STATUS_TIMEOUT_S", 0.2)
    stream = house.client.stream("x", request_id="r")
    reading = asyncio.ensure_future(anext(stream))
    await house.scheduler.next_submit()
    house.scheduler.answers = False
    for _ in range(4):  # one chunk per status question
        await house.scheduler.asked.acquire()
        house.scheduler.send_chunk("r", [1], "a")
        await reading
        reading = asyncio.ensure_future(anext(stream))
    house.scheduler.send_complete("r")
    with pytest.raises(StopAsyncIteration):
        await reading
