"""The scheduler over gRPC, between a gateway played by the test and worker groups without models."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer, decoders, models

from childproc.wires import open_channel
from echelon.pb import inference_pb2, process_pb2, scheduler_pb2, scheduler_pb2_grpc, worker_pb2, worker_pb2_grpc
from scheduler.config import ConfigError
from scheduler.core import SchedulerCore
from scheduler.process import group_client
from scheduler.process.group_client import GroupClient, GroupEvents, write_if_open
from scheduler.process.outbox import Outbox
from scheduler.process.server import SchedulerServer
from scheduler.requests.outputs import Chunk, Failed
from tests.helpers.fake_group import FakeEngine, FakeModel, plain_tokens
from tests.helpers.fake_group_server import FakeGroupServer
from tests.helpers.fake_tiers import FakeTiers
from tests.helpers.scheduler_sim import letters, seq_sampling, submit

TARGET, DRAFT = worker_pb2.ENGINE_ROLE_TARGET, worker_pb2.ENGINE_ROLE_DRAFT
PROMPT = [5, 4, 3, 2, 1]


class Gateway:
    """A stream to the scheduler: sends requests, sorts replies."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = scheduler_pb2_grpc.SchedulerStub(channel)
        self.call: Any = self.stub.Connect()
        self.waiting: deque[scheduler_pb2.SchedulerReply] = deque()  # received, not read yet
        self.tokens: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}

    async def submit(self, message: scheduler_pb2.Submit) -> None:
        await self.call.write(scheduler_pb2.SchedulerRequest(submit=message))

    async def cancel(self, request_id: str) -> None:
        await self.call.write(scheduler_pb2.SchedulerRequest(cancel=scheduler_pb2.Cancel(request_id=request_id)))

    async def next_reply(self) -> scheduler_pb2.SchedulerReply:
        while not self.waiting:
            batch = await asyncio.wait_for(self.call.read(), 30)
            assert isinstance(batch, scheduler_pb2.SchedulerReplies), "the stream ended"
            self.waiting.extend(batch.replies)
        reply = self.waiting.popleft()
        if reply.HasField("chunk"):
            tokens = self.tokens.setdefault(reply.request_id, [])
            assert reply.chunk.offset == len(tokens)
            tokens.extend(reply.chunk.token_ids)
            self.text[reply.request_id] = self.text.get(reply.request_id, "") + reply.chunk.text
        return reply

    async def end_of(self, request_id: str) -> scheduler_pb2.SchedulerReply:
        """Waits for the last message of a request."""
        while True:
            reply = await self.next_reply()
            if reply.request_id == request_id and not reply.HasField("chunk"):
                return reply

    async def status(self) -> scheduler_pb2.SchedulerStatus:
        return await self.stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())

    async def until(self, condition: Callable[[scheduler_pb2.SchedulerStatus], bool]) -> None:
        """Polls the status, as a supervisor does."""
        async with asyncio.timeout(30):
            while not condition(await self.status()):
                pass


class House:
    """A scheduler with a target group and a draft group."""

    def __init__(self, tokenizer_dir: Path) -> None:
        self.target = FakeGroupServer(FakeEngine())
        self.draft = FakeGroupServer(FakeEngine(role=DRAFT, model=FakeModel(agreement=80)))
        self.spec = process_pb2.SchedulerSpec(
            name="scheduler-0",
            host="127.0.0.1",
            version="test",
            model_name="fake",
            tokenizer_dir=str(tokenizer_dir),
            speculation=process_pb2.SpeculationSpec(method="draft_model", pipeline="serial", num_speculative_tokens=3),
            scheduler=process_pb2.SchedulerSection(
                max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, max_queue=4, enable_prefix_caching=True
            ),
            round_timeout_s=60.0,
            max_rounds_in_flight=2,
        )
        self.channels: list[grpc.aio.Channel] = []
        self.address = ""

    async def start(self) -> None:
        self.spec.target.address = await self.target.start()
        self.spec.target.incarnation = 1
        self.spec.draft.address = await self.draft.start()
        self.server = SchedulerServer(self.spec)
        self.address = await self.server.start(10.0)

    def channel(self) -> grpc.aio.Channel:
        self.channels.append(open_channel(self.address))
        return self.channels[-1]

    def gateway(self) -> Gateway:
        return Gateway(self.channel())

    async def stop(self) -> None:
        for channel in self.channels:
            await channel.close()
        await self.server.stop(0.0)
        await self.target.stop()
        await self.draft.stop()


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={letters([i]): i for i in range(40)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
async def house(tokenizer_dir: Path) -> AsyncIterator[House]:
    house = House(tokenizer_dir)
    await house.start()
    yield house
    await house.stop()


def expected(message: scheduler_pb2.Submit, count: int) -> list[int]:
    return plain_tokens(list(message.prompt_token_ids), seq_sampling(message), count)


async def test_requests_stream_concurrently(house: House) -> None:
    gateway = house.gateway()
    messages = [submit(f"r{i}", [*PROMPT, i], max_tokens=20, seed=i) for i in range(4)]
    for message in messages:
        await gateway.submit(message)
    waiting = {message.request_id for message in messages}
    while waiting:
        reply = await gateway.next_reply()
        if reply.HasField("complete"):
            waiting.remove(reply.request_id)
            assert reply.complete.seed == int(reply.request_id[1:])
            assert reply.complete.speculation.num_accepted_tokens > 0
    for message in messages:
        assert gateway.tokens[message.request_id] == expected(message, 20)
        assert gateway.text[message.request_id] == letters(expected(message, 20))
    status = await gateway.status()
    assert status.ready
    assert status.draft_ready
    assert (status.num_requests_running, status.num_requests_waiting) == (0, 0)
    assert status.num_free_blocks == status.num_blocks > 0
    assert status.num_free_draft_blocks == status.num_draft_blocks > 0
    assert status.generation_tokens_total == 80


async def test_cancel_ends_with_abort_and_frees_everything(house: House) -> None:
    gateway = house.gateway()
    await gateway.submit(submit("r", PROMPT, max_tokens=120))
    await gateway.next_reply()
    await gateway.cancel("r")
    end = await gateway.end_of("r")
    (finished,) = end.complete.finished
    assert finished.reason == inference_pb2.FINISH_REASON_ABORT
    assert finished.num_tokens == len(gateway.tokens["r"])
    status = await gateway.status()
    assert status.num_free_blocks == status.num_blocks


async def test_a_lost_gateway_ends_only_its_own_requests(house: House) -> None:
    house.target.pause()
    lost, other = house.gateway(), house.gateway()
    await lost.submit(submit("lost", PROMPT, max_tokens=100))
    await other.submit(submit("other", PROMPT, max_tokens=10))
    await other.until(lambda status: status.num_requests_running + status.num_requests_waiting == 2)
    lost.call.cancel()
    await other.until(lambda status: status.num_requests_running + status.num_requests_waiting == 1)
    house.target.resume()
    assert (await other.end_of("other")).HasField("complete")


async def test_a_deadline_ends_a_hanging_request(house: House) -> None:
    house.target.pause()
    gateway = house.gateway()
    await gateway.submit(submit("r", PROMPT, timeout_s=0.05))
    end = await gateway.end_of("r")
    assert end.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    house.target.resume()
    await gateway.until(lambda status: status.num_free_blocks == status.num_blocks)


async def test_refusals_do_not_disturb_running_requests(house: House) -> None:
    house.target.pause()
    gateway = house.gateway()
    await gateway.submit(submit("r", PROMPT, max_tokens=9))
    await gateway.submit(submit("r", PROMPT))
    refusal = await gateway.next_reply()
    assert refusal.error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    house.target.resume()
    assert (await gateway.end_of("r")).HasField("complete")
    assert gateway.tokens["r"] == expected(submit("r", PROMPT), 9)


async def test_a_stream_controls_only_its_own_requests(house: House) -> None:
    house.target.pause()
    owner, stranger = house.gateway(), house.gateway()
    message = submit("r", PROMPT, max_tokens=9, enabled=False)
    await owner.submit(message)
    await owner.until(lambda status: status.num_requests_running == 1)
    await stranger.cancel("r")
    adjust = scheduler_pb2.Adjust(request_id="r", speculation=inference_pb2.Speculation(num_speculative_tokens=3))
    await stranger.call.write(scheduler_pb2.SchedulerRequest(adjust=adjust))
    await stranger.submit(submit("done", PROMPT, max_tokens=1))
    house.target.resume()
    await stranger.end_of("done")
    end = await owner.end_of("r")
    assert end.complete.finished[0].reason == inference_pb2.FINISH_REASON_LENGTH
    assert end.complete.speculation.num_draft_tokens == 0
    assert owner.tokens["r"] == expected(message, 9)


async def test_a_submit_that_cannot_be_served_leaves_its_stream_open(house: House) -> None:
    gateway = house.gateway()
    message = submit("r", PROMPT, max_tokens=9)
    await gateway.submit(message)
    for number, bad in enumerate(({"top_k": -1}, {"logit_bias": {-1: 1.0}}, {"n": 0}, {"timeout_s": math.nan})):
        await gateway.submit(submit(f"bad{number}", PROMPT, **bad))
        end = await gateway.end_of(f"bad{number}")
        assert end.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    await gateway.submit(submit("late", [*PROMPT, 40]))
    assert "token id 40 is outside the vocabulary of 40" in (await gateway.end_of("late")).error.message
    await gateway.submit(submit("last", PROMPT, max_tokens=9))
    await gateway.end_of("last")
    assert gateway.tokens["r"] == gateway.tokens["last"] == expected(message, 9)


@pytest.mark.parametrize("duration_s", [math.nan, math.inf, -1.0])
async def test_a_recording_lasts_a_number_of_seconds(house: House, duration_s: float) -> None:
    stub = house.gateway().stub
    with pytest.raises(grpc.aio.AioRpcError, match="duration_s must be in") as refused:
        await stub.Trace(scheduler_pb2.TraceRequest(duration_s=duration_s)).read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_request_is_taken_over_by_its_own_client_only(house: House) -> None:
    """Which has lost its gateway, or believes so, and comes through another."""
    house.target.pause()
    first, stranger, second = house.gateway(), house.gateway(), house.gateway()
    await first.submit(submit("r", PROMPT, max_tokens=9, tenant="a"))
    await first.until(lambda status: status.num_requests_running + status.num_requests_waiting == 1)
    resumed = submit("r", PROMPT, max_tokens=9, tenant="b")
    resumed.resume_from.samples.add()
    await stranger.submit(resumed)
    assert (await stranger.end_of("r")).error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    resumed.tenant = "a"
    await second.submit(resumed)
    assert (await first.end_of("r")).complete.finished[0].reason == inference_pb2.FINISH_REASON_ABORT
    house.target.resume()
    assert (await second.end_of("r")).HasField("complete")
    assert second.tokens["r"] == expected(resumed, 9)


async def test_an_id_stays_in_use_until_its_end_is_delivered(house: House) -> None:
    """Another gateway may send the same id in the same pass of the event loop in which the first one cancels."""
    replica = house.server.replica
    house.target.pause()
    first, second = Outbox(), Outbox()
    replica.submit(submit("r", PROMPT), first)
    replica.cancel("r")
    replica.submit(submit("r", PROMPT), second)
    assert (await second.take_all()).replies[0].error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert (await first.take_all()).replies[-1].HasField("complete")
    house.target.resume()
    replica.submit(submit("r", PROMPT), second)
    while not (replies := (await second.take_all()).replies)[-1].HasField("complete"):
        assert not replies[-1].HasField("error")


async def test_speculation_survives_its_group(house: House) -> None:
    gateway = house.gateway()
    house.draft.drop_streams()
    await gateway.submit(submit("r", PROMPT, max_tokens=30))
    assert (await gateway.end_of("r")).HasField("complete")
    assert gateway.tokens["r"] == expected(submit("r", PROMPT), 30)
    await gateway.until(lambda status: status.draft_ready)
    await gateway.submit(submit("again", PROMPT, max_tokens=30))
    assert (await gateway.end_of("again")).complete.speculation.num_accepted_tokens > 0


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_draft_group_that_was_started_again_is_used_at_once(house: House, hangs: bool) -> None:
    gateway = house.gateway()
    if hangs:
        house.draft.pause()
    else:
        await house.draft.stop()
    another = FakeGroupServer(FakeEngine(role=DRAFT, incarnation=2, model=FakeModel(agreement=80)))
    endpoint = process_pb2.GroupEndpoint(address=await another.start(), incarnation=2)
    await gateway.submit(submit("r", PROMPT, max_tokens=60))
    await gateway.next_reply()
    update = process_pb2.GroupUpdate(role=DRAFT, endpoint=endpoint)
    house.server.replica.on_update(process_pb2.ProcessUpdate(group=update))
    assert (await gateway.end_of("r")).complete.speculation.num_accepted_tokens > 0
    assert gateway.tokens["r"] == expected(submit("r", PROMPT), 60)
    assert not (await gateway.status()).draft_lost
    await another.stop()


async def test_losing_the_target_fails_requests_and_health_until_it_is_back(house: House) -> None:
    gateway = house.gateway()
    health = health_pb2_grpc.HealthStub(house.channel())
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    house.target.pause()
    await gateway.submit(submit("r", PROMPT))
    await gateway.until(lambda status: status.num_requests_running == 1)
    house.target.drop_streams()
    end = await gateway.end_of("r")
    assert end.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "target group" in end.error.message
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    house.target.resume()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    await gateway.submit(submit("again", PROMPT, max_tokens=9))
    assert (await gateway.end_of("again")).HasField("complete")
    assert gateway.tokens["again"] == expected(submit("again", PROMPT), 9)


@pytest.mark.parametrize("how", ["dies", "hangs", "answers nonsense"])
async def test_requests_go_on_at_the_target_group_that_was_started_again(tokenizer_dir: Path, how: str) -> None:
    house = House(tokenizer_dir)
    house.spec.keeps_requests = True
    await house.start()
    gateway = house.gateway()
    await gateway.submit(submit("r", PROMPT, max_tokens=60, n=1))
    await gateway.next_reply()
    match how:
        case "dies":
            await house.target.stop()
            await gateway.until(lambda status: status.target_lost)
        case "hangs":
            house.target.pause()
        case _:
            house.target.shift_round_ids = 1
            await gateway.until(lambda status: status.target_lost)
    await gateway.submit(submit("late", PROMPT, max_tokens=9))
    another = FakeGroupServer(FakeEngine(incarnation=2))
    endpoint = process_pb2.GroupEndpoint(address=await another.start(), incarnation=2)
    update = process_pb2.GroupUpdate(role=TARGET, endpoint=endpoint)
    house.server.replica.on_update(process_pb2.ProcessUpdate(group=update))
    for request_id, count in (("r", 60), ("late", 9)):
        if request_id not in gateway.tokens or len(gateway.tokens[request_id]) < count:
            await gateway.end_of(request_id)
        assert gateway.tokens[request_id] == expected(submit(request_id, PROMPT), count)
    status = await gateway.status()
    assert (status.ready, status.target_losses_total, status.draft_losses_total) == (True, 1, 0)
    await house.stop()
    await another.stop()


async def test_a_target_group_that_is_given_up_fails_its_requests(tokenizer_dir: Path) -> None:
    house = House(tokenizer_dir)
    house.spec.keeps_requests = True
    await house.start()
    gateway = house.gateway()
    house.target.pause()
    await gateway.submit(submit("r", PROMPT))
    await house.target.stop()
    await gateway.until(lambda status: status.target_lost)
    assert (await gateway.status()).accepts_requests
    update = process_pb2.GroupUpdate(role=TARGET, given_up="five starts failed")
    house.server.replica.on_update(process_pb2.ProcessUpdate(group=update))
    assert (await gateway.end_of("r")).error.message == "target group: five starts failed"
    assert not (await gateway.status()).accepts_requests
    await gateway.submit(submit("late", PROMPT))
    assert (await gateway.end_of("late")).error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    await house.stop()


async def test_a_round_without_answer_counts_as_a_lost_group_until_one_is_answered(tokenizer_dir: Path) -> None:
    house = House(tokenizer_dir)
    house.spec.round_timeout_s = 0.1
    await house.start()
    gateway = house.gateway()
    for request_id in ("r", "first of the next stream"):
        house.target.pause()
        await gateway.submit(submit(request_id, PROMPT))
        end = await gateway.end_of(request_id)
        assert end.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert "did not answer within 0.1 s" in end.error.message
        # Connections are accepted throughout, but nobody runs a round.
        await gateway.until(lambda status: "does not answer" in status.not_ready_reason)
        assert (await gateway.status()).target_silent_s > 0
        house.target.resume()
        await gateway.until(lambda status: status.ready)
        assert (await gateway.status()).target_silent_s == 0
    await house.stop()


async def test_an_idle_group_that_is_gone_is_noticed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_client, "_INFO_TIMEOUT_S", 0.2)
    monkeypatch.setattr(group_client, "_IDLE_PATIENCE_S", 0.2)
    gateway = house.gateway()
    house.target.is_there = False
    await gateway.until(lambda status: "did not answer within" in status.not_ready_reason)
    assert (await gateway.status()).draft_ready
    house.target.is_there = True
    await gateway.until(lambda status: status.ready)
    await gateway.submit(submit("r", PROMPT, max_tokens=9))
    assert (await gateway.end_of("r")).HasField("complete")


async def test_an_idle_group_with_a_rank_that_is_gone_is_noticed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_client, "_CALL_ON_IDLE_S", 0.1)
    gateway = house.gateway()
    house.target.silent_s = 7.0
    await gateway.until(lambda status: status.target_silent_s >= 7)
    house.target.silent_s = 16.0
    await gateway.until(lambda status: status.not_ready_reason == "target group: rank 1 does not answer")
    assert (await gateway.status()).target_silent_s >= 16
    house.target.silent_s = 0.01  # asked just now
    await gateway.until(lambda status: status.ready and status.target_silent_s == 0)
    await gateway.submit(submit("r", PROMPT, max_tokens=9))
    assert (await gateway.end_of("r")).HasField("complete")


async def test_a_hanging_draft_is_left_behind_and_catches_up(house: House) -> None:
    """Its rounds were quick, so the target does not wait for a slow one; when the draft answers again, it drafts
    again."""
    gateway = house.gateway()
    messages = {name: submit(name, PROMPT, max_tokens=60) for name in ("before", "meanwhile", "after")}
    for name, message in messages.items():
        if name == "meanwhile":
            house.draft.pause()
        else:
            house.draft.resume()
        await gateway.submit(message)
        end = await gateway.end_of(name)
        assert (end.complete.speculation.num_draft_tokens > 0) == (name != "meanwhile")
        assert gateway.tokens[name] == expected(message, 60)
    assert house.draft.num_streams == 1, "it was not given up"
    status = await gateway.status()
    assert status.draft_ready
    assert status.num_free_draft_blocks == status.num_draft_blocks


async def test_a_round_beyond_the_message_limit_is_refused_before_it_is_sent(house: House) -> None:
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    connected = asyncio.Event()
    client = GroupClient(
        "target group",
        house.spec.target,
        worker_pb2.ENGINE_ROLE_TARGET,
        version="test",
        round_timeout_s=0.0,
        events=GroupEvents(
            connected=lambda *_: connected.set(), result=lambda _: None, lost=lambda reason: lost.set_result(reason)
        ),
    )
    running = asyncio.create_task(client.run())
    await connected.wait()
    largest = 2**32 - 1  # five bytes on the wire
    num_tokens = worker_pb2.WIRE_LIMIT_MESSAGE_BYTES // 5 + 1
    client.send(worker_pb2.Round(init_seqs=[worker_pb2.SeqInit(token_ids=[largest] * num_tokens)]))
    reason = await lost
    assert reason.startswith("a message of a round has at most 64 MiB (")
    assert "scheduler.max_num_seqs" in reason
    running.cancel()


async def test_what_is_written_to_a_stream_that_has_ended_is_dropped(house: House) -> None:
    """A group may end a stream just after it was opened. Who reads the stream sees it; who writes must not fail."""
    async with open_channel(house.spec.target.address) as channel:
        call: Any = worker_pb2_grpc.WorkerStub(channel).Rounds()
        call.cancel()
        with pytest.raises(asyncio.InvalidStateError):
            await call.write(worker_pb2.RoundRequest())
        await write_if_open(call, worker_pb2.RoundRequest())


async def test_moves_are_answered_during_rounds_and_do_not_count_as_rounds(house: House) -> None:
    """What the disk holds comes after `connected`. A round that is not answered is noticed as if no move had been."""
    digests = [bytes([number]) * 16 for number in range(2)]
    engine = house.target.engines[worker_pb2.ENGINE_ROLE_TARGET]
    engine.tiers = FakeTiers(num_slots=4, num_disk_blocks=8, disk=dict.fromkeys(digests, ()))
    events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    client = GroupClient(
        "target group",
        house.spec.target,
        worker_pb2.ENGINE_ROLE_TARGET,
        version="test",
        round_timeout_s=0.2,
        events=GroupEvents(
            connected=lambda info, _: events.put_nowait(("connected", info.num_disk_blocks)),
            result=lambda result: events.put_nowait(("result", result.round_id)),
            lost=lambda reason: events.put_nowait(("lost", reason)),
            moved=lambda result: events.put_nowait(("moved", result.move_id)),
            disk=lambda contents: events.put_nowait(("disk", list(contents.digests))),
        ),
    )
    running = asyncio.create_task(client.run())
    assert await events.get() == ("connected", 8)
    assert await events.get() == ("disk", digests)
    client.send(worker_pb2.Round(round_id=1, incarnation=1))
    client.send_move(
        worker_pb2.MoveOrder(move_id=7, kind=worker_pb2.MoveOrder.READ, host_slots=[0], digests=digests[:1])
    )
    assert await events.get() == ("result", 1)
    assert await events.get() == ("moved", 7)
    house.target.pause()
    client.send(worker_pb2.Round(round_id=2, incarnation=1))
    assert await events.get() == ("lost", "did not answer within 0.2 s")
    running.cancel()


async def test_draining_finishes_running_requests_and_accepts_no_new_ones(house: House) -> None:
    house.target.pause()
    gateway = house.gateway()
    await gateway.submit(submit("r", PROMPT, max_tokens=9))
    await gateway.until(lambda status: status.num_requests_running == 1)
    stopping = asyncio.create_task(house.server.stop(30.0))
    await gateway.until(lambda status: not status.ready)
    await gateway.submit(submit("late", PROMPT))
    refusal = await gateway.next_reply()
    assert refusal.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "shutting down" in refusal.error.message
    house.target.resume()
    assert (await gateway.end_of("r")).HasField("complete")
    await stopping


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: setattr(spec.target, "incarnation", 9), "incarnation 1, expected 9"),
        (lambda spec: setattr(spec, "version", "other"), "version test, this scheduler is other"),
    ],
)
async def test_a_target_that_does_not_fit_is_refused_by_name(
    tokenizer_dir: Path, change: Callable[[process_pb2.SchedulerSpec], None], words: str
) -> None:
    house = House(tokenizer_dir)
    house.spec.target.address = await house.target.start()
    house.spec.target.incarnation = 1
    house.spec.speculation.method = "none"
    change(house.spec)
    server = SchedulerServer(house.spec)
    with pytest.raises(ConfigError, match=words):
        await server.start(0.2)
    await server.stop(0.0)
    await house.target.stop()


async def test_a_taken_port_is_named(house: House) -> None:
    spec = process_pb2.SchedulerSpec()
    spec.CopyFrom(house.spec)
    spec.port = int(house.address.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"cannot listen on {house.address}"):
        await SchedulerServer(spec).start(1.0)


def chunk(index: int, offset: int, text: str) -> Chunk:
    told = {"token_ids": [offset], "logprobs": [], "drafted": [offset == 1]}
    return Chunk(request_id="r", index=index, offset=offset, text=text, **told)


async def test_a_slow_gateway_holds_one_chunk_for_each_sample() -> None:
    outbox = Outbox()
    for offset in range(3):
        outbox.put(chunk(0, offset, "ab"))
        outbox.put(chunk(1, offset, "cd"))
    outbox.put(Failed(request_id="r", code=1, message="over"))
    first, second, last = (await outbox.take_all()).replies
    assert (first.chunk.index, list(first.chunk.token_ids), first.chunk.text) == (0, [0, 1, 2], "ababab")
    assert (second.chunk.index, list(second.chunk.token_ids), second.chunk.text) == (1, [0, 1, 2], "cdcdcd")
    assert list(first.chunk.drafted) == [False, True, False]
    assert last.error.message == "over"


async def test_an_id_that_is_used_again_gets_an_answer_each_time() -> None:
    outbox = Outbox()
    outbox.put(chunk(0, 0, "ab"))
    outbox.put(Failed(request_id="r", code=1, message="over"))
    outbox.put(chunk(0, 0, "cd"))
    outbox.put(Failed(request_id="r", code=2, message="refused"))
    replies = (await outbox.take_all()).replies
    assert [reply.chunk.text or reply.error.message for reply in replies] == ["ab", "over", "cd", "refused"]


async def test_a_trace_holds_the_rounds_of_both_engines(house: House) -> None:
    gateway = house.gateway()
    call = gateway.stub.Trace(scheduler_pb2.TraceRequest(num_rounds=3))
    await call.initial_metadata()  # the recording has begun
    with pytest.raises(grpc.aio.AioRpcError, match="another recording runs") as refused:
        await gateway.stub.Trace(scheduler_pb2.TraceRequest()).read()
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await gateway.submit(submit("r", PROMPT, max_tokens=30))
    events = [event async for event in call]
    rounds = [event.round for event in events if event.HasField("round")]
    assert {traced.group for traced in rounds} == {"target", "draft"}
    assert sum(traced.group == "target" for traced in rounds) == 3
    assert all(traced.sent_ns < traced.received_ns for traced in rounds)
    waits = [event.wait for event in events if event.HasField("wait")]
    assert any(wait.engine == TARGET and wait.run_ns > 0 for wait in waits)  # serial: it waits for drafts
    assert (await gateway.end_of("r")).HasField("complete")
    assert gateway.tokens["r"] == expected(submit("r", PROMPT), 30)


async def test_a_trace_ends_with_its_time_and_with_its_reader(house: House) -> None:
    gateway = house.gateway()
    assert [event async for event in gateway.stub.Trace(scheduler_pb2.TraceRequest(duration_s=0.01))] == []
    call = gateway.stub.Trace(scheduler_pb2.TraceRequest())
    await call.initial_metadata()
    call.cancel()
    async with asyncio.timeout(30):
        while True:  # until the scheduler has noticed
            with contextlib.suppress(grpc.aio.AioRpcError):
                again = gateway.stub.Trace(scheduler_pb2.TraceRequest(duration_s=0.01))
                assert [event async for event in again] == []
                break


async def test_an_internal_error_is_fatal(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that has lost its state must end instead of answering."""
    gateway = house.gateway()

    def broken(core: SchedulerCore, now: float) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(SchedulerCore, "plan_target", broken)
    await gateway.submit(submit("r", PROMPT))
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(house.server.failure, 30)


async def test_an_unexpected_answer_counts_as_a_lost_group(house: House) -> None:
    gateway = house.gateway()
    house.target.shift_round_ids = 1
    await gateway.submit(submit("r", PROMPT))
    end = await gateway.end_of("r")
    assert end.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "result of round 2 came, expected was 1" in end.error.message
