"""The front door of a whole deployment: gateway, scheduler, target and draft as processes, without Ray."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import grpc
import openai
import pydantic
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from childproc.edge import EXIT_PARENT_DIED
from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings
from cluster.local import LOCAL_SERVER, LocalDeployment, LocalDraft, local_settings
from echelon import AsyncClient, Client, __version__
from echelon.cli.app import main
from echelon.errors import (
    DeadlineExceededError,
    EchelonError,
    InvalidRequestError,
    NotFoundError,
)
from echelon.pb import process_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.helpers.hostile import garbled_call, knock
from tests.helpers.listening import listening_sockets
from tests.helpers.scrape import free_port, scrape
from tests.helpers.wheel import build_wheel, install

ROOT = Path(__file__).parents[2]
TARGET, DRAFT = ROOT / "models" / "demo-target", ROOT / "models" / "demo-draft"
MAX_MODEL_LEN = 512
PROMPT = "def quicksort(items):\n"
READY = health_pb2.HealthCheckRequest(service="echelon.v1.Inference")


@pytest.fixture(scope="module")
def deployment() -> Iterator[LocalDeployment]:
    settings = local_settings(
        TARGET,
        draft=LocalDraft(folder=DRAFT),
        dtype="float32",  # a prefix hit must not change a token
        kv_cache=KvCacheSettings(device_bytes=32 << 20),
        scheduler=SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=MAX_MODEL_LEN),
        server=replace(LOCAL_SERVER, http_port=free_port()),
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        yield deployment


@pytest.fixture
def address(deployment: LocalDeployment) -> str:
    return deployment.running.gateway_address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with open_blocking_channel(address) as channel:
        yield channel


def scheduler_status(deployment: LocalDeployment) -> scheduler_pb2.SchedulerStatus:
    with open_blocking_channel(deployment.running.replicas[0].scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        return stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)  # polls another process: there is nothing to wait on


def all_is_free(deployment: LocalDeployment) -> bool:
    status = scheduler_status(deployment)
    return (
        status.num_requests_running + status.num_requests_waiting == 0
        and status.num_free_blocks == status.num_blocks
        and status.num_free_draft_blocks == status.num_draft_blocks
    )


def test_the_stream_is_what_generate_returns(client: Client) -> None:
    options: Any = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with client.stream(PROMPT, **options) as stream:
        chunks = list(stream)
        streamed = stream.result()
    assert [chunk.offset for chunk in chunks[1:]] == [
        sum(len(chunk.token_ids) for chunk in chunks[: i + 1]) for i in range(len(chunks) - 1)
    ]
    assert len(streamed.token_ids) == 24
    assert streamed.finish_reason == "length"
    assert streamed.usage.completion_tokens == 24
    again = client.generate(PROMPT, **options)
    assert (again.text, again.token_ids) == (streamed.text, streamed.token_ids)


def test_a_seed_replays_a_request(client: Client) -> None:
    first = client.generate(PROMPT, max_tokens=16, temperature=1.0)
    assert client.generate(PROMPT, max_tokens=16, temperature=1.0, seed=first.seed).token_ids == first.token_ids


def test_a_request_chooses_how_it_speculates(client: Client) -> None:
    drafted = client.generate(
        PROMPT, max_tokens=16, ignore_eos=True, temperature=0, speculation={"num_speculative_tokens": 4}
    )
    plain = client.generate(PROMPT, max_tokens=16, ignore_eos=True, temperature=0, speculation={"enabled": False})
    assert drafted.speculation.num_draft_tokens > 0
    assert plain.speculation.num_draft_tokens == 0
    assert plain.tokens_per_target_step == 1.0


def test_speculation_is_switched_off_and_on_while_a_request_runs(deployment: LocalDeployment, client: Client) -> None:
    options: Any = {"max_tokens": MAX_MODEL_LEN - 64, "ignore_eos": True, "temperature": 0}
    undisturbed = client.generate(PROMPT, **options)

    def drafted() -> int:
        return scheduler_status(deployment).speculation_total.num_draft_tokens

    def read(stream: Any, num_tokens: int) -> None:
        while num_tokens > 0:
            num_tokens -= len(next(stream).token_ids)

    with client.stream(PROMPT, request_id="switched", **options) as stream:
        read(stream, 32)
        assert client.set_speculation("switched", enabled=False)
        read(stream, 32)  # what was in flight
        before = drafted()
        read(stream, 32)
        assert drafted() == before
        assert client.set_speculation("switched", num_speculative_tokens=4)
        assert stream.result().token_ids == undisturbed.token_ids
    assert drafted() > before
    assert not client.set_speculation("switched", enabled=False)


def test_samples_and_logprobs(client: Client) -> None:
    completion = client.generate(PROMPT, max_tokens=6, n=2, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    assert [sample.index for sample in completion.samples] == [0, 1]
    for sample in completion.samples:
        assert [position.chosen.token_id for position in sample.logprobs] == list(sample.token_ids)
        assert all(len(position.top) == 2 for position in sample.logprobs)
    assert len(completion.prompt_logprobs) == completion.usage.prompt_tokens
    assert completion.prompt_logprobs[0] is None


async def test_chat_and_the_async_client(address: str) -> None:
    async with AsyncClient(address) as client:
        answer = await client.chat([{"role": "user", "content": "import os"}], max_tokens=8)
    assert 0 < answer.usage.completion_tokens <= 8


def test_the_command_line(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", PROMPT, "--address", address, "--max-tokens", "8", "-t", "0"])
    assert ended.value.code in (None, 0)
    with Client(address) as client:
        assert capfd.readouterr().out.rstrip("\n") == client.generate(PROMPT, max_tokens=8, temperature=0).text.rstrip(
            "\n"
        )


def test_the_client_runs_from_the_wheel_alone(address: str, client: Client, tmp_path: Path) -> None:
    """In an environment that has what the wheel asks for, and so neither torch nor ray."""
    folder = install(build_wheel(tmp_path), tmp_path / "venv")

    def run(command: str, *arguments: str) -> str:
        ran = subprocess.run([folder / command, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert "run-batch" in run("echelon", "--help")
    expected = client.generate(PROMPT, max_tokens=8, temperature=0).text
    written = run("echelon", "generate", PROMPT, "--address", address, "--max-tokens", "8", "-t", "0")
    assert written.rstrip("\n") == expected.rstrip("\n")


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("x = 1\n" * 600, {}, InvalidRequestError, f"text: the prompt has .* but max_model_len is {MAX_MODEL_LEN}"),
        ([5000], {}, InvalidRequestError, r"token_ids\[0\]: token id 5000 is outside the vocabulary of 4096"),
        ([], {}, InvalidRequestError, "token_ids: the prompt is empty"),
        ([{"role": "", "content": "x"}], {}, InvalidRequestError, r"chat\.messages\[0\]\.role"),
        ("x", {"top_p": 1.5}, InvalidRequestError, r"sampling\.top_p: must be in \(0, 1\], got 1\.5"),
        ("x", {"n": 65}, InvalidRequestError, r"sampling\.n: "),
        ("x", {"model": "other"}, NotFoundError, "model: 'other' is not served here"),
        ("x" * (17 << 20), {}, InvalidRequestError, "send a shorter prompt"),
        ("x", {"timeout_s": 0.001}, DeadlineExceededError, "DEADLINE_EXCEEDED"),
    ],
)  # fmt: skip
def test_bad_requests(client: Client, prompt: Any, options: Any, error: type[EchelonError], message: str) -> None:
    with pytest.raises(error, match=message):
        client.generate(prompt, **options)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x1a\x02\xff\xfe", "text: invalid UTF-8 at byte 0"),
        (b"\x1a\x01a\x32\x07\xfa\x06\x04abcd", "sampling: unknown field number 111"),
    ],
)
def test_bad_bytes(channel: grpc.Channel, raw: bytes, message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as err:
        next(channel.unary_stream("/echelon.v1.Inference/Generate")(raw))
    assert err.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def endless(client: Client, **options: Any) -> Any:
    """A stream that has begun and would continue for a long time."""
    stream = client.stream(PROMPT, max_tokens=MAX_MODEL_LEN - 64, ignore_eos=True, **options)
    next(stream)
    return stream


def test_metrics_count_requests_and_tokens(deployment: LocalDeployment, client: Client) -> None:
    def read() -> dict[tuple[str, ...], float]:
        return scrape(deployment.settings.server.http_port, model_name="demo-target")

    before = read()
    completion = client.generate(PROMPT, max_tokens=16, ignore_eos=True, temperature=0)
    after = read()

    def grown(name: str, *labels: str) -> float:
        key = (f"echelon:{name}", *labels)
        return after[key] - before.get(key, 0.0)

    assert grown("generation_tokens_total", "0") == 16
    assert grown("prompt_tokens_total", "0") == completion.usage.prompt_tokens
    assert grown("prefix_cache_queries_total", "0") > 0
    assert grown("request_success_total", "length") == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert 0 < grown("inter_token_latency_seconds_count") < 16
    assert grown("spec_decode_num_accepted_tokens_total", "0") == completion.speculation.num_accepted_tokens
    assert grown("draft_tokens_total", "0") >= completion.speculation.num_draft_tokens
    assert after["echelon:num_requests_running", "0"] == 0
    assert 0 < after["echelon:acceptance_rate", "0"] <= 1


def test_a_trace_shows_what_both_groups_do(address: str, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    arguments = ["trace", "--out", str(out), "--rounds", "12", "--address", address]
    recording = subprocess.Popen([sys.executable, "-m", "echelon.cli.app", *arguments], cwd=ROOT)
    while recording.poll() is None:  # the recording needs rounds
        client.generate(PROMPT, max_tokens=64, ignore_eos=True, temperature=0)
    assert recording.returncode == 0
    events = json.loads(out.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    lanes = {(processes[e["pid"]], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert {("target group", "rank 0"), ("draft group", "rank 0"), ("scheduler", "target rounds")} <= lanes
    spans = [e for e in events if e["ph"] == "X"]
    names = {group: {e["name"] for e in spans if processes[e["pid"]] == group} for group in processes.values()}
    assert names["target group"] >= {"verify", "sample"}
    assert names["draft group"] >= {"draft", "sample"}
    assert names["scheduler"] >= {"target round", "draft round"}
    rounds = {(e["name"].split()[0], e["args"]["round"]): e for e in spans if e["name"].endswith(" round")}
    assert sum(engine == "target" for engine, _ in rounds) == 12
    for span in spans:
        if processes[span["pid"]] != "scheduler":
            whole = rounds[span["args"]["engine"], span["args"]["round"]]
            assert whole["ts"] <= span["ts"]
            assert span["ts"] + span["dur"] <= whole["ts"] + whole["dur"] + 1e-3  # floats of microseconds


def test_a_dropped_stream_frees_everything(deployment: LocalDeployment, client: Client) -> None:
    stream = endless(client, n=2)
    assert not all_is_free(deployment)
    stream.close()
    wait_until(lambda: all_is_free(deployment))


def test_a_deadline_frees_everything(deployment: LocalDeployment, client: Client) -> None:
    with pytest.raises(DeadlineExceededError):
        endless(client, timeout_s=1.0).result()
    wait_until(lambda: all_is_free(deployment))


def test_cancel_by_id(deployment: LocalDeployment, client: Client) -> None:
    stream = endless(client, request_id="mine")
    assert client.cancel("mine")
    completion = stream.result()
    assert completion.finish_reason == "abort"
    assert 0 < completion.usage.completion_tokens < MAX_MODEL_LEN - 64
    wait_until(lambda: all_is_free(deployment))
    assert not client.cancel("mine")


def test_reflection_describes_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="echelon.v1.Inference"),
    ]
    services, file = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in services.list_services_response.service}
    assert names == {
        "echelon.v1.Inference",
        "echelon.v1.Jobs",
        "echelon.v1.Control",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"GenerateRequest" in file.file_descriptor_response.file_descriptor_proto[0]


@contextmanager
def stopped(deployment: LocalDeployment, name: str) -> Iterator[None]:
    """Stops a process, which keeps its connections and does nothing."""
    pid = deployment.processes.read(lambda board: board.process(name).pid)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # another is there in its place
            os.kill(pid, signal.SIGCONT)


def test_a_hanging_scheduler_is_replaced_and_its_streams_go_on(
    deployment: LocalDeployment, channel: grpc.Channel, client: Client
) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(READY)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    options: Any = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    undisturbed = client.generate(PROMPT, **options)
    with client.stream(PROMPT, **options) as stream:
        next(stream)
        with stopped(deployment, deployment.plan.replicas[0].scheduler.name):
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert stream.result().token_ids == undisturbed.token_ids
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    wait_until(lambda: all_is_free(deployment))


def test_a_hanging_draft_delays_no_request_and_comes_back(deployment: LocalDeployment, client: Client) -> None:
    options: Any = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    undisturbed = client.generate(PROMPT, **options)
    drafting: Any = {**options, "speculation": {"num_speculative_tokens": 4}}
    with stopped(deployment, "draft-0.0"):
        assert client.generate(PROMPT, **drafting).token_ids == undisturbed.token_ids
        wait_until(lambda: scheduler_status(deployment).draft_silent_s > 0)
        assert scheduler_status(deployment).ready
    wait_until(lambda: scheduler_status(deployment).draft_ready)
    completion = client.generate(PROMPT, **drafting)
    assert completion.token_ids == undisturbed.token_ids
    assert completion.speculation.num_draft_tokens > 0
    wait_until(lambda: all_is_free(deployment))


def test_a_hanging_target_is_replaced_and_its_streams_go_on(deployment: LocalDeployment, client: Client) -> None:
    options: Any = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    undisturbed = client.generate(PROMPT, **options)
    with client.stream(PROMPT, **options) as stream:
        next(stream)
        with stopped(deployment, "target-0.0"):
            wait_until(lambda: not scheduler_status(deployment).ready)
            assert stream.result().token_ids == undisturbed.token_ids
    wait_until(lambda: client.server_info().num_ready_replicas == 1)
    wait_until(lambda: all_is_free(deployment))


def test_a_deployment_survives_anything_sent_to_its_ports(deployment: LocalDeployment, client: Client) -> None:
    rng = random.Random(5)
    processes = deployment.processes.read(lambda board: board.processes)
    doors = sorted(listening_sockets(process.pid for process in processes if process.pid is not None))
    options: Any = {"max_tokens": MAX_MODEL_LEN - 64, "ignore_eos": True, "temperature": 0}
    undisturbed = client.generate(PROMPT, **options)
    with client.stream(PROMPT, **options) as stream, contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(knock(rng.choice(doors), rng))
        for process in processes:
            if process.address:
                channel = stack.enter_context(open_blocking_channel(process.address))
                codes = {garbled_call(channel, rng) for _ in range(15)}
                assert grpc.StatusCode.UNAVAILABLE not in codes, process.name
        assert stream.result().token_ids == undisturbed.token_ids
    after = deployment.processes.read(lambda board: board.processes)
    assert after == processes
    wait_until(lambda: all_is_free(deployment))


# `python -m gateway` by itself


def start_gateway(**fields: Any) -> "subprocess.Popen[bytes]":
    spec = process_pb2.GatewaySpec(
        name="gateway-0",
        server=process_pb2.ServerSection(host="127.0.0.1"),
        version=__version__,
        model_name="demo",
        model_dir=str(TARGET),
        scheduler_addresses=["127.0.0.1:1"],
        max_model_len=64,
        vocab_size=4096,
    )
    spec.MergeFrom(process_pb2.GatewaySpec(**fields))
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(json_format.MessageToJson(spec, indent=None).encode() + b"\n")
    process.stdin.flush()
    return process


def next_event(process: "subprocess.Popen[bytes]") -> process_pb2.ProcessEvent:
    assert process.stdout is not None
    return json_format.Parse(process.stdout.readline(), process_pb2.ProcessEvent())


@pytest.fixture
def http(deployment: LocalDeployment) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{deployment.settings.server.http_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as http:
        yield http


@pytest.mark.parametrize("stream", [False, True])
def test_a_seed_gives_the_same_over_http(client: Client, http: openai.OpenAI, stream: bool) -> None:
    options: Any = {"max_tokens": 16, "temperature": 0.8, "seed": 5, "n": 2}
    expected = client.generate(PROMPT, ignore_eos=True, **options)
    extra = {"ignore_eos": True, "return_token_ids": True}
    answer = http.completions.create(model="", prompt=PROMPT, extra_body=extra, stream=stream, **options)
    texts, token_ids = {0: "", 1: ""}, {0: [], 1: []}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
            token_ids[choice.index] += getattr(choice, "token_ids", [])
    assert [texts[0], texts[1]] == [sample.text for sample in expected.samples]
    assert [token_ids[0], token_ids[1]] == [list(sample.token_ids) for sample in expected.samples]


def test_a_conversation_over_http(client: Client, http: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "import os"}]
    options: Any = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = client.chat(messages, logprobs=2, **options)
    answer = http.chat.completions.create(
        model="demo-target",
        messages=messages,
        max_completion_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, "speculation": {"enabled": False}},
    )
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for position, ours in zip(choice.logprobs.content, expected.samples[0].logprobs, strict=True):
        assert position.logprob == pytest.approx(ours.chosen.logprob, abs=1e-4)
        assert len(position.top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == 12
    events = http.chat.completions.create(
        model="demo-target",
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *pieces, last = events
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


class Person(pydantic.BaseModel, extra="forbid"):
    name: Annotated[str, pydantic.Field(max_length=8)]
    age: Annotated[int, pydantic.Field(ge=0, le=150)]


def test_structured_output(client: Client, http: openai.OpenAI) -> None:
    """One schema through both doors, and the other forms."""
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    parsed = http.chat.completions.parse(model="demo-target", messages=messages, response_format=Person, seed=3)
    person = parsed.choices[0].message.parsed
    assert person is not None
    assert parsed.choices[0].finish_reason == "stop"
    same = client.chat(messages, structured_output={"json_schema": Person.model_json_schema()}, seed=3)
    assert same.text == parsed.choices[0].message.content
    for form, expected in (
        ({"regex": "[ab]{3,5}"}, r"[ab]{3,5}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "x" [0-9] [0-9] "y"?'}, r"x\d\dy?"),
    ):
        for options in ({"temperature": 0}, {"seed": 5, "min_tokens": 40, "max_tokens": 64}):
            completion = client.generate("Answer:", structured_output=form, **options)
            assert re.fullmatch(expected, completion.text)
            assert completion.samples[0].finish_reason == "stop"
    cut = client.generate("Answer:", structured_output={"regex": "[ab]{3,5}"}, stop="b", seed=1, max_tokens=2)
    assert set(cut.text) <= {"a", "b"}, "a stop string and max_tokens end an output where they do"


def test_prompts_are_scored_over_http(client: Client, http: openai.OpenAI) -> None:
    """As evaluation harnesses do it: several prompts, no output."""
    prompts = [PROMPT, "import os\n"]
    answer = http.completions.create(model="demo-target", prompt=prompts, echo=True, logprobs=1, max_tokens=0)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        scored = client.generate(prompt, max_tokens=1, prompt_logprobs=1).prompt_logprobs
        assert choice.text == prompt
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == [
            None if position is None else pytest.approx(position.chosen.logprob, abs=1e-4) for position in scored
        ]
        assert "".join(choice.logprobs.tokens or []).endswith(prompt)


async def test_a_client_that_leaves_over_http_frees_everything(deployment: LocalDeployment) -> None:
    url = f"http://127.0.0.1:{deployment.settings.server.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as http:
        extra = {"ignore_eos": True}
        stream = await http.completions.create(
            model="demo-target", prompt=PROMPT, max_tokens=400, stream=True, extra_body=extra
        )
        async for _ in stream:
            break
        assert not all_is_free(deployment)
        await stream.close()
        wait_until(lambda: all_is_free(deployment))


def test_http_errors(http: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"prompt: .* max_model_len is {MAX_MODEL_LEN}") as refused:
        http.completions.create(model="demo-target", prompt="x = 1\n" * 600)
    assert refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError, match="model: 'gpt' is not served here"):
        http.completions.create(model="gpt", prompt="x")
    hurried = {"extra_body": {"ignore_eos": True}, "extra_headers": {"x-request-timeout": "0.05"}}
    with pytest.raises(openai.InternalServerError, match=r"not finished within 0\.0\d\d s") as late:
        http.completions.create(model="", prompt=PROMPT, max_tokens=400, **hurried)
    assert late.value.status_code == 504


@pytest.mark.parametrize("key", ["grpc_port", "http_port"])
def test_a_taken_port_is_reported_as_the_last_event(key: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start_gateway(server={key: port}) as process:
            error = next_event(process).failed.error
            assert f"127.0.0.1:{port} is taken" in error
            assert f"server.{key}" in error
            assert process.wait(30) == 1


def test_a_missing_model_folder_is_named() -> None:
    with start_gateway(model_dir="/nowhere") as process:
        assert "model_dir: /nowhere" in next_event(process).failed.error
        assert process.wait(30) == 1


def test_a_gateway_dies_with_its_parent() -> None:
    with start_gateway() as process:
        assert next_event(process).progress.stage == "waiting for the scheduler"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == EXIT_PARENT_DIED


def test_sigterm_ends_a_gateway_cleanly() -> None:
    with start_gateway() as process:
        assert next_event(process).progress.stage == "waiting for the scheduler"
        process.terminate()
        assert process.wait(30) == 0
