"""Requests that are read in separate processes: the result is the same, and reading always ends."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from echelon import __version__
from echelon.pb import inference_pb2 as pb
from echelon.pb.process_pb2 import GatewaySpec
from echelon.pb.reading_pb2 import ReadAnswer, Reading
from echelon.pb.sampling_pb2 import SamplingParams
from echelon.pb.scheduler_pb2 import RequestError, Submit
from gateway.requests.forms import Form
from gateway.requests.lane import Lane
from gateway.requests.reader_process import ReaderLostError, ReaderProcess
from gateway.requests.refusal import Refusal
from gateway.requests.validation import build_validator
from tests.helpers.demo_folders import make_folder

# Ends at once, loops, takes memory, calls itself or computes without a break, as the first message says.
WILD = """
{%- set wish = messages[0].content -%}
{%- macro again() -%}{{ again() }}{%- endmacro -%}
{%- if wish == "loop" -%}
  {%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif wish == "memory" -%}
  {{- wish * 1000000000 -}}
{%- elif wish == "recursion" -%}
  {{- again() -}}
{%- elif wish == "power" -%}
  {{- 9 ** (9 ** 9) -}}
{%- else -%}
  {{- wish -}}
{%- endif -%}
"""
FOR_EVER_S = 1000.0
LESS = "send a shorter one, or token_ids, which are read as they are"


@pytest.fixture
def spec(tmp_path: Path) -> GatewaySpec:
    folder = make_folder(tmp_path, config={"chat_template": WILD})
    return GatewaySpec(
        name="test", version=__version__, model_name="demo", model_dir=str(folder), max_model_len=64, vocab_size=4096
    )


class Processes:
    """Starts processes for a lane and keeps track of them."""

    def __init__(self, spec: GatewaySpec, cpu_limit_s: float) -> None:
        self.spec = spec
        self.cpu_limit_s = cpu_limit_s
        self.started: list[ReaderProcess] = []

    async def __call__(self) -> ReaderProcess:
        self.started.append(await ReaderProcess.start(self.spec, cpu_limit_s=self.cpu_limit_s, niceness=0))
        return self.started[-1]


def chat(content: str) -> bytes:
    message = pb.ChatMessage(role="user", content=content)
    sampling = SamplingParams(seed=1)
    return pb.GenerateRequest(
        request_id="r", chat=pb.ChatMessages(messages=[message]), sampling=sampling
    ).SerializeToString()


def lane_before(start: Any, *, limit_s: float = FOR_EVER_S, max_waiting_bytes: int = 1 << 20) -> Lane:
    return Lane(start, limit_s=limit_s, max_waiting_bytes=max_waiting_bytes)


async def read(lane: Lane, data: bytes) -> Submit:
    (submit,) = (await lane.read(Form.GENERATE, data)).submits
    return submit


async def refusal(lane: Lane, data: bytes) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await read(lane, data)
    return refused.value


async def test_wild_templates_are_refused_and_the_next_request_is_read(spec: GatewaySpec) -> None:
    processes = Processes(spec, cpu_limit_s=0.5)
    lane = lane_before(processes)
    for wish, words in (
        ("loop", "request: reading it takes more than 0.5 s of computing; " + LESS),
        ("memory", "request: reading it takes more than 1024 MiB; " + LESS),
        ("recursion", "chat.messages: the model's chat template calls itself too often with this conversation"),
        ("", "chat: the prompt is empty; at least one token is needed"),
    ):
        refused = await refusal(lane, chat(wish))
        assert (refused.code, refused.message) == (grpc.StatusCode.INVALID_ARGUMENT, words)
    assert await read(lane, chat("Hi")) == build_validator(spec).read(chat("Hi"))
    assert len(processes.started) == 1, "none of these costs the process"
    await lane.close()


async def test_a_process_that_does_not_answer_is_replaced(spec: GatewaySpec) -> None:
    processes = Processes(spec, cpu_limit_s=FOR_EVER_S)
    lane = lane_before(processes, limit_s=2.0)
    for wish in ("loop", "power"):
        refused = await refusal(lane, chat(wish))
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "given up, because its process did not answer within 2 s" in refused.message
    assert (await read(lane, chat("Hi"))).request_id == "r"
    assert [process.is_alive for process in processes.started] == [False, False, True]
    asked = asyncio.create_task(processes.started[-1].ask(Form.GENERATE, chat("loop"), limit_s=FOR_EVER_S))
    os.kill(processes.started[-1].pid, signal.SIGABRT)  # what a library does that gets no memory
    with pytest.raises(ReaderLostError, match="ended by SIGABRT, as it does when it needs more than 1024 MiB"):
        await asked
    await lane.close()
    assert not processes.started[-1].is_alive


async def test_a_process_that_died_while_idle_costs_no_request(spec: GatewaySpec) -> None:
    processes = Processes(spec, cpu_limit_s=FOR_EVER_S)
    lane = lane_before(processes)
    await read(lane, chat("Hi"))
    first = processes.started[0]
    os.kill(first.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    assert (await read(lane, chat("Hi"))).request_id == "r"
    await lane.close()


class Played:
    """A process played by the test: it answers when told to."""

    is_alive = True

    def __init__(self) -> None:
        self.asked: asyncio.Queue[bytes] = asyncio.Queue()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()
        self.ended = False

    async def ask(self, form: Form, request: bytes, *, limit_s: float) -> bytes:
        self.asked.put_nowait(request)
        answer = await self.answers.get()
        if not answer:
            raise ReaderLostError("it ended with status 9")
        return answer

    async def end(self) -> None:
        self.ended = True

    def submit(self, request_id: str) -> None:
        reading = Reading(submits=[Submit(request_id=request_id)])
        self.answers.put_nowait(ReadAnswer(reading=reading).SerializeToString())


@pytest.fixture
def played() -> Played:
    return Played()


@pytest_asyncio.fixture
async def lane(played: Played) -> AsyncIterator[Lane]:
    async def start() -> Played:
        return played

    lane = lane_before(start, max_waiting_bytes=100)
    yield lane
    await lane.close()


async def test_the_shortest_request_is_read_first(played: Played, lane: Lane) -> None:
    reads = [asyncio.create_task(read(lane, b"x" * size)) for size in (9, 30, 20, 10, 30)]
    for i in range(5):
        await played.asked.get() if i else None
        played.submit(str(i))
    done = [(await read).request_id for read in reads]
    assert done == ["0", "3", "2", "1", "4"]


async def test_clients_that_left_are_not_waited_for(played: Played, lane: Lane) -> None:
    leaving, waiting, staying = (asyncio.create_task(read(lane, data)) for data in (b"a", b"bb", b"ccc"))
    assert await played.asked.get() == b"a"
    leaving.cancel()
    waiting.cancel()
    await asyncio.wait([leaving, waiting])
    played.submit("a")
    assert await played.asked.get() == b"ccc"
    played.submit("c")
    assert (await staying).request_id == "c"


async def test_bytes_that_wait_are_limited(played: Played, lane: Lane) -> None:
    reading = asyncio.create_task(read(lane, b"x" * 60))
    await played.asked.get()  # it has left the queue
    waiting = asyncio.create_task(read(lane, b"x" * 60))
    await asyncio.sleep(0)
    refused = await refusal(lane, b"x" * 60)
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "60 bytes wait to be read, and at most 100 may" in refused.message
    played.submit("1")
    await reading
    await played.asked.get()
    played.submit("2")
    assert (await waiting).request_id == "2"


async def test_a_refusal_arrives_as_it_was_written(played: Played, lane: Lane) -> None:
    error = RequestError(code=grpc.StatusCode.NOT_FOUND.value[0], message="model: no")
    played.answers.put_nowait(ReadAnswer(refusal=error).SerializeToString())
    refused = await refusal(lane, b"x")
    assert (refused.code, refused.message) == (grpc.StatusCode.NOT_FOUND, "model: no")


async def test_only_the_request_that_lost_the_process_fails(played: Played, lane: Lane) -> None:
    first, second = asyncio.create_task(read(lane, b"a")), asyncio.create_task(read(lane, b"bb"))
    played.answers.put_nowait(b"")
    with pytest.raises(Refusal, match="given up, because it ended with status 9"):
        await first
    assert played.ended
    played.submit("b")
    assert (await second).request_id == "b"


async def test_a_process_that_does_not_start_is_an_error_of_each_request() -> None:
    async def start() -> ReaderProcess:
        raise ReaderLostError("it ended with status 1")

    lane = lane_before(start)
    for _ in range(2):
        refused = await refusal(lane, b"x")
        assert refused.code == grpc.StatusCode.UNAVAILABLE, "the next one may start"
        assert "it ended with status 1" in refused.message
    await lane.close()
