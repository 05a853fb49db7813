import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from echelon import AsyncClient, Client
from echelon import client as client_module
from echelon.errors import (
    DeadlineExceededError,
    EchelonError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from echelon.jobs import line_of
from echelon.pb import inference_pb2 as pb
from echelon.pb import sampling_pb2
from echelon.requests import GenerateOptions, SamplingOptions, SpeculationOptions, build_request
from echelon.results import Usage
from tests.helpers.fake_gateway import FakeGateway, chunk, complete, refuse, serving

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as fake:
        yield fake


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.address) as client:
        yield client


def test_generate_returns_everything(client: Client, gateway: FakeGateway) -> None:
    completion = client.generate("Hi", max_tokens=4, temperature=0, timeout_s=30)
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("Hello", (1, 2, 3, 4), "length")
    assert completion.usage == Usage(
        prompt_tokens=44,
        completion_tokens=4,
        cached_prompt_tokens=40,
        cached_prompt_tokens_from_host=36,
        cached_prompt_tokens_from_disk=3,
    )
    assert (completion.request_id, completion.seed) == ("r", 99)
    assert completion.speculation.acceptance_rate == 0.5
    assert completion.tokens_per_target_step == 2.0
    assert 0 < gateway.time_remaining_s[0] < 31  # the timeout is rounded up on the wire
    request = gateway.requests[0]
    assert (request.text, request.sampling.max_tokens) == ("Hi", 4)
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")


def test_stream_yields_chunks_and_then_has_the_result(client: Client) -> None:
    with client.stream("Hi") as stream:
        assert [(c.text, c.token_ids, c.offset) for c in stream] == [("Hel", (1, 2), 0), ("lo", (3, 4), 2)]
        assert stream.result().text == "Hello"
        assert stream.result() is stream.result()


def test_leaving_a_stream_cancels_the_request(client: Client, gateway: FakeGateway) -> None:
    gateway.script = gateway.hang_after_one_chunk
    with client.stream("Hi") as stream:
        assert next(stream).text == "a"
    assert gateway.dropped.wait(30)


def test_forgetting_a_stream_cancels_the_request(client: Client, gateway: FakeGateway) -> None:
    gateway.script = gateway.hang_after_one_chunk
    for _ in client.stream("Hi"):
        break
    assert gateway.dropped.wait(30)


async def test_the_async_client_behaves_the_same(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        assert (await client.generate([1, 2], n=1, cache_salt="tenant")).text == "Hello"
        assert gateway.requests[-1].cache_salt == "tenant"
        assert list(gateway.requests[-1].token_ids.ids) == [1, 2]
        assert [c.text async for c in client.stream("Hi")] == ["Hel", "lo"]
        answer = await client.chat([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
        assert answer.finish_reason == "length"
        assert gateway.requests[-1].chat.add_generation_prompt is False
        assert await client.cancel("r")
        assert await client.set_speculation("r", enabled=True)
        assert gateway.adjusted[-1].speculation == pb.Speculation(enabled=True)
        assert (await client.model_info()).model == "demo"
        assert (await client.server_info()).num_ready_replicas == 1
        gateway.script = refuse(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: must be in (0, 1], got 7")
        with pytest.raises(InvalidRequestError, match="top_p"):
            await client.generate("Hi", top_p=7)
        gateway.script = gateway.hang_after_one_chunk
        async with client.stream("Hi") as stream:
            await anext(stream)
    assert gateway.dropped.wait(30)


def test_chat_template_variables_are_sent_as_json(client: Client, gateway: FakeGateway) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    client.chat(
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],  # type: ignore[typeddict-unknown-key]
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False, "top": 2},
    )
    chat = gateway.requests[-1].chat
    assert json.loads(chat.messages[1].extra) == {"tool_calls": [call]}
    assert chat.messages[0].extra == ""
    assert json.loads(chat.chat_template_kwargs) == {"enable_thinking": False, "top": 2}
    assert chat.continue_final_message
    assert not chat.HasField("add_generation_prompt")


def test_a_text_may_have_its_special_tokens_already(client: Client, gateway: FakeGateway) -> None:
    client.generate("<s>Hi", add_special_tokens=False)
    client.generate("Hi")
    assert [r.add_special_tokens if r.HasField("add_special_tokens") else None for r in gateway.requests] == [
        False,
        None,
    ]


def test_other_calls(client: Client, gateway: FakeGateway) -> None:
    assert client.cancel("r")
    assert not client.cancel("other")
    assert gateway.cancelled == ["r", "other"]
    assert dataclasses.asdict(client.model_info()) == {
        "model": "demo",
        "max_model_len": 64,
        "vocab_size": 9,
        "eos_token_ids": (0,),
        "has_chat_template": True,
    }
    assert client.server_info().version == "1"


def test_the_speculation_of_a_running_request_can_change(client: Client, gateway: FakeGateway) -> None:
    assert client.set_speculation("r", enabled=False)
    assert client.set_speculation("r", num_speculative_tokens=3, enabled=None)
    assert client.set_speculation("r")
    assert not client.set_speculation("other")
    assert [request.speculation for request in gateway.adjusted[:3]] == [
        pb.Speculation(enabled=False),
        pb.Speculation(num_speculative_tokens=3),
        pb.Speculation(),
    ]
    with pytest.raises(TypeError, match="unknown speculation option 'enable'; did you mean 'enabled'"):
        client.set_speculation("r", enable=False)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^num_speculative_tokens: "):
        client.set_speculation("r", num_speculative_tokens=-1)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.ALREADY_EXISTS, InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.INTERNAL, EchelonError),
    ],
)
def test_errors_carry_the_status_and_message_of_the_server(
    client: Client, gateway: FakeGateway, code: grpc.StatusCode, error: type[EchelonError]
) -> None:
    gateway.script = refuse(code, "in these words")
    with pytest.raises(error, match=f"^{code.name}: in these words$") as caught:
        client.generate("Hi")
    assert (caught.value.code, caught.value.message) == (code.name, "in these words")


def test_an_unreachable_server_is_an_error() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        client.server_info()


def test_of_several_gateways_the_first_that_answers_serves(gateway: FakeGateway) -> None:
    with Client(f"127.0.0.1:1, {gateway.address}") as client:
        assert client.generate("Hi").text == "Hello"
        assert client.server_info().version == "1"
        assert client.cancel("r")
        assert not client.cancel("other")
    with Client(["127.0.0.1:1", "127.0.0.1:2"]) as client:
        for ask in (client.server_info, lambda: client.generate("Hi"), lambda: client.cancel("r")):
            with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:[12]"):
                ask()


async def test_the_async_client_takes_several_gateways_too(gateway: FakeGateway) -> None:
    async with AsyncClient(["127.0.0.1:1", gateway.address]) as client:
        assert (await client.model_info()).model == "demo"
        assert (await client.generate("Hi")).text == "Hello"
        assert await client.cancel("r")
    async with AsyncClient(["127.0.0.1:1", "127.0.0.1:2"]) as client:
        with pytest.raises(UnavailableError):
            await client.generate("Hi")


def test_an_address_is_needed() -> None:
    with pytest.raises(ValueError, match="address: host:port of at least one gateway is needed, got ' ,'"):
        Client(" ,")


def test_an_interrupt_while_a_call_starts_does_not_hang_close(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ctrl-C does at the wrong moment: grpc has made the call, but the thread that reads its events never runs."""
    caller, start = threading.current_thread(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        start(thread)  # the gateway's

    monkeypatch.setattr(client_module, "CLOSE_TIMEOUT_S", 0.1)
    gateway.script = gateway.hang_after_one_chunk
    with Client(gateway.address) as client, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.stream("Hi")


def test_a_stream_that_ends_without_completion_is_an_error(client: Client, gateway: FakeGateway) -> None:
    gateway.script = lambda request, context: iter([chunk("a", [1])])
    with pytest.raises(EchelonError, match="without its completion"):
        client.generate("Hi")


def test_logprobs_and_stop_details(client: Client, gateway: FakeGateway) -> None:
    def position(token_id: int, rank: int) -> sampling_pb2.PositionLogprobs:
        token = sampling_pb2.TokenLogprob(token_id=token_id, logprob=-0.5, rank=rank, text="t")
        return sampling_pb2.PositionLogprobs(chosen=token, top=[token])

    def script(request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        yield chunk("a", [5], logprobs=[position(5, 0)])
        end = complete(1, reason=pb.FINISH_REASON_STOP, stop_token_id=0)
        end.complete.prompt_logprobs.extend([sampling_pb2.PositionLogprobs(), position(3, 2)])
        yield end

    gateway.script = script
    completion = client.generate("Hi", logprobs=1, prompt_logprobs=1)
    assert completion.logprobs[0].chosen.token_id == 5
    assert completion.logprobs[0].top[0].rank is None
    first, second = completion.prompt_logprobs
    assert first is None
    assert second is not None
    assert (second.chosen.token_id, second.chosen.rank) == (3, 2)
    assert completion.finish_reason == "stop"
    assert (completion.samples[0].stop_token_id, completion.samples[0].stop_str) == (0, None)


def test_every_option_reaches_its_field() -> None:
    options = GenerateOptions(
        temperature=0.5,
        logit_bias={3: -1.0},
        stop="END",
        stop_token_ids=[7, 8],
        ignore_eos=True,
        seed=(1 << 64) - 1,
        request_id="me",
        model="demo",
        cache_salt="tenant",
        attention="budgeted",
        structured_output={"json_schema": {"b": 1, "a": 2}},
        speculation={"enabled": False, "num_speculative_tokens": 0},
        top_k=None,
    )
    request = build_request([{"role": "user", "content": "Hi"}], options)
    assert request.sampling.temperature == 0.5
    assert dict(request.sampling.logit_bias) == {3: -1.0}
    assert list(request.sampling.stop) == ["END"]
    assert list(request.sampling.stop_token_ids) == [7, 8]
    assert request.sampling.ignore_eos
    assert request.sampling.seed == (1 << 64) - 1
    assert (request.request_id, request.model, request.cache_salt) == ("me", "demo", "tenant")
    assert request.attention.mode == "budgeted"
    assert request.structured_output.json_schema == '{"b": 1, "a": 2}'
    assert request.speculation.HasField("num_speculative_tokens")
    assert request.speculation.enabled is False
    assert not request.sampling.HasField("top_k")
    assert request.chat.messages[0].content == "Hi"


def test_typed_options_match_the_wire() -> None:
    assert SamplingOptions.__optional_keys__ == set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert SpeculationOptions.__optional_keys__ == set(pb.Speculation.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("Hi", {"temprature": 1}, TypeError, "unknown option 'temprature'; did you mean 'temperature'?"),
        ("Hi", {"zzz": 1}, TypeError, "unknown option 'zzz'; known are add_generation_prompt, "),
        ("Hi", {"speculation": {"enable": True}}, TypeError, "'enable'; did you mean 'enabled'?"),
        ("Hi", {"max_tokens": "many"}, TypeError, "^max_tokens: "),
        ("Hi", {"max_tokens": 1 << 40}, ValueError, "^max_tokens: "),
        ("Hi", {"stop": 3}, TypeError, "^stop: "),
        ("Hi", {"seed": -1}, ValueError, "^seed: "),
        ("Hi", {"cache_salt": 7}, TypeError, "^cache_salt: "),
        ("Hi", {"structured_output": {"choices": ["a"]}}, TypeError, "did you mean 'choice'"),
        ("Hi", {"structured_output": {"choice": [1]}}, TypeError, "^texts: "),
        ("Hi", {"logit_bias": {"a": 1}}, TypeError, "^logit_bias: "),
        ("Hi", {"add_generation_prompt": True}, TypeError, "^add_generation_prompt: "),
        ("Hi", {"chat_template_kwargs": {}}, TypeError, "^chat_template_kwargs: is for a conversation"),
        (CHAT, {"chat_template_kwargs": [1]}, TypeError, "^chat_template_kwargs: must be a mapping, got list"),
        (CHAT, {"chat_template_kwargs": {"a": {1}}}, TypeError, "^chat_template_kwargs: must be JSON"),
        ([{**CHAT[0], "tool_calls": {1}}], {}, TypeError, r"^prompt\[0\]: must be JSON"),
        ("a\ud800", {}, ValueError, "^prompt: is not valid Unicode"),
        ([1, -1], {}, ValueError, "^prompt: token ids"),
        ([1, "a"], {}, TypeError, "^prompt: token ids"),
        (7, {}, TypeError, "^prompt: must be text, token ids or chat messages, got int"),
        ([{"role": "user"}], {}, TypeError, r"^prompt\[0\]: .*'role' and 'content'"),
        ([{"role": "user", "content": 3}], {}, TypeError, r"^prompt\[0\]: role and content must be text"),
    ],
)
def test_wrong_arguments_are_named(prompt: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("?", r"\?")):
        build_request(prompt, options)


def test_an_empty_list_is_an_empty_prompt() -> None:
    assert build_request([], {}).WhichOneof("input") == "token_ids"


def test_what_is_no_request_of_a_job_is_named() -> None:
    """Such as the keys of a single body, which was given instead of a list of bodies."""
    single: Any = {"prompt": "x"}
    with pytest.raises(TypeError, match=r"requests\[0\]: must be the body of a request or a line of a batch, got str"):
        [line_of(number, request) for number, request in enumerate(single)]
