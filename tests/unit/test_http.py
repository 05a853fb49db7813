"""OpenAI's API over loopback, between real clients and a scheduler that the test plays."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import grpc
import openai
import pytest
import pytest_asyncio

from echelon import __version__
from echelon.pb import inference_pb2 as pb
from echelon.pb import process_pb2
from echelon.pb.sampling_pb2 import PositionLogprobs, TokenLogprob
from gateway.doors import http_server
from gateway.server import Gateway
from tests.helpers.demo_folders import make_folder
from tests.helpers.fake_scheduler import FakeScheduler, serve
from tests.helpers.scrape import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")
MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass
class House:
    scheduler: FakeScheduler
    gateway: Gateway
    port: int
    client: openai.AsyncOpenAI

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content, without a client's own ideas."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        head = {"host": "x", "connection": "close", "content-type": "application/json", **given}
        head["content-length"] = str(len(data))
        lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in head.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        answer = await reader.read()
        writer.close()
        head_lines, _, content = answer.partition(b"\r\n\r\n")
        status, *fields = head_lines.decode().split("\r\n")
        named = dict(field.lower().split(": ", 1) for field in fields)
        return int(status.split()[1]), named, json.loads(content) if "json" in named["content-type"] else content


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[House]:
    async with opened() as house:
        yield house


@asynccontextmanager
async def opened(model_dir: Path = MODEL_DIR) -> AsyncIterator[House]:
    scheduler = FakeScheduler()
    server, scheduler_address = await serve(scheduler)
    port = free_port()
    spec = process_pb2.GatewaySpec(
        name="test",
        version=__version__,
        server=process_pb2.ServerSection(host="127.0.0.1", http_port=port),
        model_name="demo",
        model_dir=str(model_dir),
        scheduler_addresses=[scheduler_address],
        max_model_len=64,
        max_message_bytes=1 << 20,
        vocab_size=4096,
    )
    gateway = Gateway(spec)
    await gateway.start()
    await gateway.wait_until_ready()
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield House(scheduler, gateway, port, client)
    await gateway.drain(grace_s=0)
    await server.stop(grace=0)


async def served(call: Any, house: House, *, text: str = "hi", token_ids: tuple[int, ...] = (1, 2)) -> Any:
    """The answer to a call, which gets a chunk and its end."""
    asked = asyncio.ensure_future(call)
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, list(token_ids), text)
    house.scheduler.send_complete(request_id)
    return await asked


def position(text: str, logprob: float, *others: tuple[str, float]) -> PositionLogprobs:
    """With the chosen token as the likeliest."""
    tokens = [
        TokenLogprob(token_id=i, text=text, logprob=logprob, rank=i + 1)
        for i, (text, logprob) in enumerate([(text, logprob), *others])
    ]
    return PositionLogprobs(chosen=tokens[0], top=tokens)


async def test_a_completion_and_its_usage(house: House) -> None:
    completion = await served(house.client.completions.create(model="demo", prompt=[5, 6, 7]), house)
    assert completion.object == "text_completion"
    assert completion.model == "demo"
    (choice,) = completion.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "hi", "length", None)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 2, 5)
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert usage.approximations == ["attention: rough"]


async def test_tokens_that_were_drafted_are_named_on_request(house: House) -> None:
    body = {"prompt": "x", "return_drafted": True}
    asked = asyncio.ensure_future(house.ask("POST", "/v1/completions", {**body, "stream": True}))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, [1, 2, 3], "", drafted=[True, True, False])
    house.scheduler.send_chunk(request_id, [4], "text", drafted=[False])
    house.scheduler.send_complete(request_id)
    events = [json.loads(line) for line in re.findall(r"data: ({.*})", (await asked)[2].decode())]
    drafted = [event["choices"][0]["drafted"] for event in events if "drafted" in event["choices"][0]]
    assert [each for piece in drafted for each in piece] == [True, True, False, False]
    asked = asyncio.ensure_future(house.ask("POST", "/v1/completions", body))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, [1, 2], "text", drafted=[True, False])
    house.scheduler.send_complete(request_id)
    assert (await asked)[2]["choices"][0]["drafted"] == [True, False]


async def test_a_conversation(house: House) -> None:
    call = house.client.chat.completions.create(model="demo", messages=HELLO, extra_headers={"x-request-id": "mine"})
    answer = await served(call, house)
    assert (answer.id, answer.object) == ("chatcmpl-mine", "chat.completion")
    message = answer.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "hi", None)


async def test_events_come_as_the_tokens_do(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = house.client.chat.completions.create(model="demo", messages=HELLO, stream=True, stream_options=options)
    asked = asyncio.ensure_future(call)
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, [1], "h")
    stream = await asked
    opening, first = await anext(stream), await anext(stream)
    assert (opening.choices[0].delta.role, opening.choices[0].delta.content) == ("assistant", "")
    assert (first.choices[0].delta.content, first.usage.completion_tokens) == ("h", 1)
    house.scheduler.send_chunk(request_id, [2, 3], "")  # text that may still become a stop string: no event
    house.scheduler.send_chunk(request_id, [4], "i")
    house.scheduler.send_complete(request_id, reason=pb.FINISH_REASON_STOP)
    rest = [event async for event in stream]
    assert [event.choices[0].delta.content for event in rest[:-2]] == ["i"]
    assert rest[-3].usage.completion_tokens == 4
    assert rest[-2].choices[0].finish_reason == "stop"
    assert rest[-1].choices == []
    assert (rest[-1].usage.completion_tokens, rest[-1].usage.prompt_tokens_details.cached_tokens) == (4, 1)
    assert {event.id for event in (opening, first, *rest)} == {opening.id}


async def test_a_stream_ends_as_openai_ends_it(house: House) -> None:
    body = {"prompt": "x", "stream": True, "return_token_ids": True}
    status, headers, content = await served(house.ask("POST", "/v1/completions", body), house)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = re.findall(rb"data: (.*)\n\n", content)
    assert events[-1] == b"[DONE]"
    opening, piece, end = (json.loads(event) for event in events[:-1])
    assert opening["choices"][0]["prompt_token_ids"] == [0, 88]
    assert (piece["choices"][0]["text"], piece["choices"][0]["token_ids"]) == ("hi", [1, 2])
    assert end["choices"][0]["finish_reason"] == "length"
    assert "usage" not in end


async def test_samples_and_prompts_have_one_numbering(house: House) -> None:
    asked = asyncio.ensure_future(house.client.completions.create(model="demo", prompt=[[5], [6, 7]], n=2))
    ids = [(await house.scheduler.next_submit()).request_id for _ in range(2)]
    for text, request_id, index in (("d", ids[1], 1), ("a", ids[0], 0), ("c", ids[1], 0), ("b", ids[0], 1)):
        house.scheduler.send_chunk(request_id, [1], text, index=index)
    for request_id in reversed(ids):
        house.scheduler.send_complete(request_id, num_samples=2)
    completion = await asked
    assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 4)


async def test_a_prompt_that_fails_ends_the_others(house: House) -> None:
    asked = asyncio.ensure_future(house.client.completions.create(model="demo", prompt=[[5], [6]]))
    first, second = [(await house.scheduler.next_submit()).request_id for _ in range(2)]
    house.scheduler.send_error(first, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full (8)")
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        await asked
    assert await house.scheduler.next_cancel() == second
    house.scheduler.send_complete(second)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_conversation(house: House, stream: bool) -> None:
    create: Any = house.client.chat.completions.create
    asked = asyncio.ensure_future(create(model="demo", messages=HELLO, logprobs=True, top_logprobs=2, stream=stream))
    request_id = (await house.scheduler.next_submit()).request_id
    logprobs = [position("h", -0.5, ("é", -float("inf"))), position("i", -0.25)]
    house.scheduler.send_chunk(request_id, [1, 2], "hi", logprobs=logprobs)
    house.scheduler.send_complete(request_id)
    answer = await asked
    choice = [event.choices[0] async for event in answer][1] if stream else answer.choices[0]
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes, second.token) == ("h", -0.5, [104], "i")
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("h", -0.5, [104]),
        ("é", -9999.0, [195, 169]),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_completion(house: House, stream: bool) -> None:
    create: Any = house.client.completions.create
    asked = asyncio.ensure_future(create(model="demo", prompt=[5], logprobs=1, stream=stream))
    request_id = (await house.scheduler.next_submit()).request_id
    for token_id, token in enumerate(("he", "llo")):
        house.scheduler.send_chunk(request_id, [token_id], token, logprobs=[position(token, -0.5)])
        await asyncio.sleep(0)
    house.scheduler.send_complete(request_id)
    answer = await asked
    parts = (
        [e.choices[0].logprobs async for e in answer if e.choices[0].logprobs]
        if stream
        else [answer.choices[0].logprobs]
    )
    assert [token for part in parts for token in part.tokens] == ["he", "llo"]
    assert [offset for part in parts for offset in part.text_offset] == [0, 2]
    assert [logprob for part in parts for logprob in part.token_logprobs] == [-0.5, -0.5]
    assert [top for part in parts for top in part.top_logprobs] == [{"he": -0.5}, {"llo": -0.5}]


async def test_a_prompt_is_scored_without_output(house: House) -> None:
    """As lm-eval does it."""
    create = house.client.completions.create(model="demo", prompt="def f", echo=True, logprobs=1, max_tokens=0)
    asked = asyncio.ensure_future(create)
    submit = await house.scheduler.next_submit()
    scored = [PositionLogprobs(), position("def", -1.0), position(" f", -2.0, ("x", -3.0))]
    house.scheduler.send_chunk(submit.request_id, [9], "never shown", logprobs=[position("never", -1)])
    house.scheduler.send_complete(submit.request_id, prompt_logprobs=scored)
    completion = await asked
    (choice,) = completion.choices
    assert choice.text == "def f"
    assert choice.logprobs.tokens == ["<|endoftext|>", "def", " f"]
    assert choice.logprobs.text_offset == [0, 0, 3], "the BOS is not in the text"
    assert choice.logprobs.token_logprobs == [None, -1.0, -2.0]
    assert choice.logprobs.top_logprobs == [None, {"def": -1.0}, {" f": -2.0, "x": -3.0}]
    assert completion.usage.completion_tokens == 0


async def test_an_echo_can_be_streamed(house: House) -> None:
    body = {"prompt": "def f", "echo": True, "max_tokens": 0, "stream": True}
    _, _, content = await served(house.ask("POST", "/v1/completions", body), house)
    events = [json.loads(event) for event in re.findall(rb"data: (\{.*)\n\n", content)]
    assert [event["choices"][0]["text"] for event in events] == ["def f", ""]


async def test_prompt_log_probabilities_as_vllm_writes_them(house: House) -> None:
    body = {"messages": HELLO, "prompt_logprobs": 1}
    asked = asyncio.ensure_future(house.ask("POST", "/v1/chat/completions", body))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_complete(request_id, prompt_logprobs=[PositionLogprobs(), position("a", -1.0)])
    _, _, answer = await asked
    assert answer["prompt_logprobs"] == [None, {"0": {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}]


@pytest.mark.parametrize(
    ("code", "error", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, openai.BadRequestError, 400),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, openai.RateLimitError, 429),
        (grpc.StatusCode.INTERNAL, openai.InternalServerError, 500),
        (grpc.StatusCode.UNAVAILABLE, openai.InternalServerError, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, openai.InternalServerError, 504),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_scheduler_have_a_status(
    house: House, code: grpc.StatusCode, error: type[openai.APIStatusError], status: int, stream: bool
) -> None:
    create: Any = house.client.completions.create
    asked = asyncio.ensure_future(create(model="demo", prompt=[5], stream=stream))
    house.scheduler.send_error((await house.scheduler.next_submit()).request_id, code, "seed: no")
    with pytest.raises(error, match="seed: no") as raised:
        await asked
    assert raised.value.status_code == status
    assert raised.value.param == ("seed" if status == 400 else None)


async def test_an_error_after_the_first_event_is_the_last_one(house: House) -> None:
    asked = asyncio.ensure_future(house.client.completions.create(model="demo", prompt=[5], stream=True))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, [1], "a")
    stream = await asked
    assert (await anext(stream)).choices[0].text == "a"
    house.scheduler.send_error(request_id, grpc.StatusCode.UNAVAILABLE, "the target died")
    with pytest.raises(openai.APIError, match="the target died"):
        await anext(stream)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(house: House, stream: bool) -> None:
    create: Any = house.client.completions.create
    asked = asyncio.ensure_future(create(model="demo", prompt=[5], stream=stream))
    request_id = (await house.scheduler.next_submit()).request_id
    house.scheduler.send_chunk(request_id, [1], "a")
    if stream:
        answer = await asked
        await anext(answer)
        await answer.close()
    else:
        asked.cancel()
    assert await house.scheduler.next_cancel() == request_id
    house.scheduler.send_complete(request_id, reason=pb.FINISH_REASON_ABORT)


async def test_a_time_limit_travels_as_the_time_that_remains(house: House) -> None:
    headers = {"x-request-timeout": "30"}
    asked = asyncio.ensure_future(house.client.completions.create(model="demo", prompt=[5], extra_headers=headers))
    submit = await house.scheduler.next_submit()
    assert 0 < submit.timeout_s < 30
    house.scheduler.send_error(submit.request_id, grpc.StatusCode.DEADLINE_EXCEEDED, "not finished within 30 s")
    with pytest.raises(openai.InternalServerError, match="not finished within 30 s") as raised:
        await asked
    assert raised.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.BadRequestError, match="x-request-timeout: must be a number of seconds > 0, got 'soon'"):
        await house.client.completions.create(model="demo", prompt=[5], extra_headers={"x-request-timeout": "soon"})


async def test_requests_may_share_an_id(house: House) -> None:
    def ask() -> asyncio.Future[Any]:
        return asyncio.ensure_future(house.ask("POST", "/v1/completions", {"prompt": [5]}, x_request_id="mine"))

    first, second = ask(), ask()
    ids = [(await house.scheduler.next_submit()).request_id for _ in range(2)]
    assert ids[0] == "mine"
    assert ids[1].startswith("mine-")
    for request_id in ids:
        house.scheduler.send_complete(request_id)
    for _, headers, answer in await asyncio.gather(first, second):
        assert (headers["x-request-id"], answer["id"]) == ("mine", "cmpl-mine")


async def test_fields_that_are_ignored_are_named(house: House) -> None:
    body = {"prompt": [5], "user": "me", "temprature": 0}
    _, headers, _ = await served(house.ask("POST", "/v1/completions", body), house)
    assert headers["x-ignored-fields"] == "user, temprature"


async def test_the_model(house: House) -> None:
    (model,) = (await house.client.models.list()).data
    assert (model.id, model.max_model_len) == ("demo", 64)
    assert (await house.client.models.retrieve("demo")).id == "demo"
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'"):
        await house.client.models.retrieve("other")


async def test_tokens_of_a_text_and_back(house: House) -> None:
    _, _, answer = await house.ask("POST", "/tokenize", {"prompt": "def f"})
    assert answer == {"count": 3, "max_model_len": 64, "tokens": [0, 519, 290]}
    _, _, answer = await house.ask("POST", "/tokenize", {"messages": HELLO})
    assert answer["tokens"][0] == 0
    _, _, answer = await house.ask("POST", "/detokenize", {"tokens": [519, 290]})
    assert answer == {"prompt": "def f"}


async def test_the_document_describes_what_is_served(house: House) -> None:
    status, _, document = await house.ask("GET", "/openapi.json")
    assert status == 200
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path == "/control/rounds":
                continue  # a stream without an end; tests/unit/test_http_control.py reads it
            asked = path.replace("{name}", "demo")
            status, headers, _ = await house.ask(method.upper(), asked, b"{}" if method == "post" else None)
            assert status == (400 if method == "post" else 200), path
            if method == "get":
                assert headers["content-type"].split(";")[0] in operation["responses"]["200"]["content"]
    text = json.dumps(document)
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= document["components"]["schemas"].keys()
    assert "max_completion_tokens" in document["components"]["schemas"]["ChatBody"]["properties"]


async def test_health_says_why(house: House) -> None:
    assert await house.ask("GET", "/health") == (200, ANY, {"status": "ready"})
    house.scheduler.ready, house.scheduler.not_ready_reason = False, "target rank 1 died"
    while (answer := await house.ask("GET", "/health"))[0] == 200:
        pass  # until the gateway has asked the scheduler
    assert answer[0] == 503
    assert "target rank 1 died" in answer[2]["error"]["message"]
    assert await house.ask("GET", "/live") == (200, ANY, {"status": "alive"})
    house.scheduler.ready = True
    while (await house.ask("GET", "/health"))[0] == 503:
        pass


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/nothing", None, 404, "GET /nothing is not served here"),
        ("GET", "/v1/completions", None, 405, "GET /v1/completions is not served here"),
        ("POST", "/v1/completions", b"{", 400, "request: is not JSON"),
        ("POST", "/v1/completions", {"prompt": [5], "top_p": 7}, 400, "top_p: must be in (0, 1], got 7"),
        ("POST", "/v1/completions", {"prompt": [5], "model": "other"}, 404, "model: 'other' is not served here"),
        ("POST", "/v1/completions", b" " * ((1 << 20) + 1), 413, "request: must have at most 1048576 bytes"),
        ("POST", "/tokenize", {"prompt": 5}, 400, "prompt: must be a valid string, got 5"),
    ],
)
async def test_every_error_has_openais_shape(
    house: House, method: str, path: str, body: Any, status: int, message: str
) -> None:
    answered, _, answer = await house.ask(method, path, body)
    assert answered == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["message"].startswith(message)


async def test_only_json_is_read(house: House) -> None:
    """Browsers send other types for any page that asks."""
    status, _, answer = await house.ask("POST", "/v1/completions", {"prompt": [5]}, content_type="text/plain")
    assert (status, answer["error"]["message"]) == (415, "content-type: must be application/json, got 'text/plain'")


async def test_a_body_of_unknown_length_is_limited_too(house: House) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 33)
    assert b" 413 " in await reader.readline()
    writer.close()


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    async with opened() as house:
        asked = asyncio.ensure_future(house.client.completions.create(model="demo", prompt=[5]))
        request_id = (await house.scheduler.next_submit()).request_id
        draining = asyncio.ensure_future(house.gateway.drain(grace_s=60))
        status, _, answer = await house.ask("POST", "/v1/completions", {"prompt": [5]})
        assert status == 503
        assert "shutting down" in answer["error"]["message"]
        house.scheduler.send_chunk(request_id, [1], "end")
        house.scheduler.send_complete(request_id)
        assert (await asked).choices[0].text == "end"
        await draining


async def test_too_many_requests_at_once_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 2)
    async with opened() as house:
        asked = [asyncio.ensure_future(house.ask("POST", "/v1/completions", {"prompt": [5]})) for _ in range(2)]
        ids = [(await house.scheduler.next_submit()).request_id for _ in asked]
        status, _, answer = await house.ask("GET", "/health")
        assert (status, answer["error"]["message"]) == (503, "too many connections are open; try again later")
        for request_id in ids:
            house.scheduler.send_complete(request_id)
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200, 200]


async def test_reasoning_and_calls_have_fields_of_their_own(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{# </think> <tool_call> #}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = ["<thi", "nk>why</think>I ", 'call.\n<tool_call>{"name": "f", "argu', 'ments": {"a": 1}}', "</tool_call>"]
    async with opened(make_folder(tmp_path, config={"chat_template": template})) as house:
        create: Any = house.client.chat.completions.create
        for stream in (False, True):
            asked = asyncio.ensure_future(
                create(model="demo", messages=HELLO, tools=tools, stream=stream, logprobs=True)
            )
            request_id = (await house.scheduler.next_submit()).request_id
            for token_id, text in enumerate(reply):
                house.scheduler.send_chunk(request_id, [token_id], text, logprobs=[position(text, -1.0)])
                await asyncio.sleep(0)
            house.scheduler.send_complete(request_id, reason=pb.FINISH_REASON_STOP)
            answer = await asked
            choices = [event.choices[0] async for event in answer] if stream else [answer.choices[0]]
            said = [choice.delta for choice in choices] if stream else [choices[0].message]
            calls = [call for part in said for call in part.tool_calls or []]
            assert "".join(getattr(part, "reasoning", "") for part in said) == "why"
            assert "".join(getattr(part, "reasoning_content", "") for part in said) == "why"
            assert "".join(part.content or "" for part in said) == "I call."
            assert "".join(call.function.arguments for call in calls) == '{"a": 1}'
            assert (calls[0].function.name, calls[0].type, calls[0].id[:5]) == ("f", "function", "call_")
            assert [call.id for call in calls[1:]] == [None] * (len(calls) - 1), "an id is said once"
            assert choices[-1].finish_reason == "tool_calls"
            scored = [token.token for choice in choices if choice.logprobs for token in choice.logprobs.content]
            assert scored == reply, "also of what is held back"
