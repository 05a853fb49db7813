"""The official clients of OpenAI's and Anthropic's APIs; the template of the deployment knows tools and reasoning."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from tests.helpers.client_deployment import client_deployment

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "def weather(city):"}]


class Forecast(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=6)
    sunny: bool


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with client_deployment(tmp_path_factory.mktemp("model")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def is_call(name: str, arguments: Any) -> bool:
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return name == "weather" and arguments["city"] in ("Paris", "Oslo") and 1 <= arguments["days"] <= 9


# -- chat completions -----------------------------------------------------------------------------------------------

TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.mark.parametrize("thinks", [False, True])
def test_a_choice_of_tools_forces_calls(client: openai.OpenAI, thinks: bool) -> None:
    options: Any = {"model": "demo", "messages": ASK, "tools": TOOLS, "seed": 4, "max_tokens": 300}
    extra = {"chat_template_kwargs": {"enable_thinking": thinks}}
    named = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(**options, tool_choice=named, extra_body=extra)
    choice = answer.choices[0]
    if thinks and choice.finish_reason == "length":
        assert not choice.message.tool_calls, "it has not stopped to think"
        return
    [call] = choice.message.tool_calls or []
    assert is_call(call.function.name, call.function.arguments)
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    if not thinks:
        answer = client.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False)
        assert len(answer.choices[0].message.tool_calls or []) == 1


# -- responses ------------------------------------------------------------------------------------------------------

FUNCTION: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}


def test_responses_are_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "input": ASK, "max_output_tokens": 12, "instructions": "Be brief."}
    extra = {"seed": 5, "ignore_eos": True}
    whole = client.responses.create(**options, extra_body=extra)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    events = list(client.responses.create(**options, stream=True, extra_body=extra))
    final = events[-1].response
    assert final.output_text == whole.output_text != ""
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events if not e.type.endswith("delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[-2].item.model_dump() == final.output[0].model_dump(), "cut short in both"


def test_a_response_continues_an_earlier_one(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "max_output_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    first = client.responses.create(input="import os", **options)
    second = client.responses.create(input="import re", previous_response_id=first.id, **options)
    by_hand = [
        {"role": "user", "content": "import os"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "import re"},
    ]
    expected = client.responses.create(input=by_hand, store=False, **options)  # type: ignore[call-overload]
    assert second.output_text == expected.output_text
    assert second.usage is not None
    assert second.usage.input_tokens == expected.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        client.responses.create(input="x", previous_response_id=expected.id, **options)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_functions_and_forms_of_responses(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "input": ASK, "tools": [FUNCTION], "tool_choice": "required"}
    options["parallel_tool_calls"] = False
    with client.responses.stream(**options, extra_body={"seed": 3}) as stream:
        deltas = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        final = stream.get_final_response()
    assert final.status == "completed"
    first, *_ = final.output
    assert first.type == "function_call"
    assert is_call(first.name, first.arguments)
    assert deltas.startswith(first.arguments)
    result: Any = [{"type": "function_call_output", "call_id": first.call_id, "output": "rain"}]
    after = client.responses.create(
        model="demo", input=result, previous_response_id=final.id, max_output_tokens=4, extra_body={"ignore_eos": True}
    )
    assert after.output_text
    parsed = client.responses.parse(model="demo", input="x = ", text_format=Forecast, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Forecast)
    with pytest.raises(openai.BadRequestError, match=r"max_output_tokens: must be >= 1"):
        client.responses.create(model="demo", input="x", max_output_tokens=-1)
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].type"):
        client.responses.create(model="demo", input="x", tools=[{"type": "web_search"}])


# -- messages -------------------------------------------------------------------------------------------------------

TOOL: Any = {"name": "weather", "input_schema": PARAMETERS}


def test_messages_are_the_same_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Be brief."}]
    options: Any = {"model": "demo", "messages": ASK, "max_tokens": 12, "system": system}
    extra = {"seed": 6}
    whole = claude.messages.create(**options, extra_body=extra)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    with claude.messages.stream(**options, extra_body=extra) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text"]
    assert text == final.content[0].text == whole.content[0].text != ""  # type: ignore[union-attr]
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 12
    counted = claude.messages.count_tokens(model="demo", messages=ASK, system=system)  # type: ignore[arg-type]
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    stopped = claude.messages.create(**options, stop_sequences=[text[3:6]], extra_body=extra)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[3:6])


def test_tools_of_messages(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "demo", "max_tokens": 200, "tools": [TOOL]}
    forced: Any = {"type": "tool", "name": "weather"}
    with claude.messages.stream(**options, messages=ASK, tool_choice=forced, extra_body={"seed": 2}) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    [use] = final.content
    assert use.type == "tool_use"
    assert is_call(use.name, use.input)
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]}
    said: Any = {"role": "assistant", "content": final.content}
    after = claude.messages.create(**{**options, "max_tokens": 5}, messages=[*ASK, said, result])
    assert after.usage.output_tokens <= 5
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    both = claude.messages.create(**options, messages=ASK, tool_choice=one, extra_body={"seed": 7})
    assert all(block.type == "tool_use" and is_call(block.name, block.input) for block in both.content)


def test_errors_of_messages(claude: anthropic.Anthropic) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type: must be text or tool"):
        claude.messages.create(model="demo", max_tokens=5, messages=image)
    with pytest.raises(anthropic.BadRequestError, match=r"stop_sequences\[0\]: is empty"):
        claude.messages.create(model="demo", max_tokens=5, messages=ASK, stop_sequences=[""])  # type: ignore[arg-type]
    with pytest.raises(anthropic.NotFoundError, match="model: 'other' is not served here"):
        claude.messages.create(model="other", max_tokens=5, messages=ASK)  # type: ignore[arg-type]
