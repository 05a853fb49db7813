"""What the clients of others do with a deployment: `python checks.py URL FILE`, in an environment that has them.

Each check is a function that raises where the client does not get what it asked for. FILE gets a line of JSON for each.
"""

import asyncio
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anthropic
import litellm
import openai
import pydantic
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

MODEL = "demo"
ASK: Any = [{"role": "user", "content": "def weather(city):"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
Check = Callable[[str], None]


class Forecast(pydantic.BaseModel, extra="forbid"):
    city: Literal["Paris", "Oslo"]
    sunny: bool


@tool
def weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def _openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def openai_chat(url: str) -> None:
    options: Any = {"model": MODEL, "messages": ASK, "max_tokens": 8, "seed": 1, "extra_body": {"ignore_eos": True}}
    whole = _openai(url).chat.completions.create(**options).choices[0].message.content
    events = _openai(url).chat.completions.create(**options, stream=True)
    assert whole == "".join(event.choices[0].delta.content or "" for event in events) != ""


def openai_async(url: str) -> None:
    async def ask() -> int:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        answers = await asyncio.gather(
            *(client.completions.create(model=MODEL, prompt="import os", max_tokens=5) for _ in range(4))
        )
        return len(answers)

    assert asyncio.run(ask()) == 4


def openai_parse(url: str) -> None:
    answer = _openai(url).beta.chat.completions.parse(model=MODEL, messages=ASK, response_format=Forecast, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Forecast)


def openai_tools(url: str) -> None:
    options: Any = {"model": MODEL, "messages": ASK, "tools": [FUNCTION], "seed": 1, "parallel_tool_calls": False}
    answer = _openai(url).chat.completions.create(**options, tool_choice="required")
    [call] = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")  # type: ignore[union-attr]
    with _openai(url).chat.completions.stream(**options, tool_choice="required") as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls


def openai_responses(url: str) -> None:
    first = _openai(url).responses.create(model=MODEL, input="import os", max_output_tokens=5)
    then = _openai(url).responses.create(
        model=MODEL, input="import re", previous_response_id=first.id, max_output_tokens=5
    )
    assert then.previous_response_id == first.id
    parsed = _openai(url).responses.parse(model=MODEL, input="x", text_format=Forecast)
    assert isinstance(parsed.output_parsed, Forecast)


def openai_batches(url: str) -> None:
    client = _openai(url)
    body = {"model": MODEL, "messages": ASK, "max_tokens": 5}
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body})
        for i in range(3)
    ]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    deadline_s = time.monotonic() + 60
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline_s:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch.status
    assert batch.id in [other.id for other in client.batches.list()]
    output = client.files.content(batch.output_file_id or "").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == ["0", "1", "2"]
    assert client.files.delete(file.id).deleted


def anthropic_messages(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    with client.messages.stream(model=MODEL, max_tokens=8, messages=ASK) as stream:
        assert stream.get_final_message().usage.output_tokens <= 8
    assert client.messages.create(model=MODEL, max_tokens=8, messages=ASK).type == "message"


def anthropic_tools(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    given: Any = {"name": "weather", "input_schema": PARAMETERS}
    choice: Any = {"type": "tool", "name": "weather"}
    answer = client.messages.create(model=MODEL, max_tokens=200, messages=ASK, tools=[given], tool_choice=choice)
    assert answer.content[0].input["city"] in ("Paris", "Oslo")  # type: ignore[union-attr]


def _langchain(url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", seed=1, max_retries=0, **options)


def langchain_chat(url: str) -> None:
    model = _langchain(url, max_tokens=8)
    assert model.invoke([HumanMessage("import os")]).usage_metadata
    assert "".join(str(piece.content) for piece in model.stream("import os"))


def langchain_tools(url: str) -> None:
    answer = _langchain(url).bind_tools([weather], tool_choice="any").invoke("import os")
    assert answer.tool_calls[0]["args"]["city"] in ("Paris", "Oslo")


def langchain_structured(url: str) -> None:
    for method in ("json_schema", "function_calling"):
        answer = _langchain(url).with_structured_output(Forecast, method=method).invoke("import os")
        assert isinstance(answer, Forecast)


def litellm_chat(url: str) -> None:
    options: Any = {"model": f"openai/{MODEL}", "messages": ASK, "api_base": f"{url}/v1", "api_key": "none", "seed": 1}
    assert litellm.completion(**options, max_tokens=8).usage.completion_tokens <= 8
    assert "".join(
        part.choices[0].delta.content or "" for part in litellm.completion(**options, max_tokens=8, stream=True)
    )


def litellm_tools(url: str) -> None:
    options: Any = {"model": f"openai/{MODEL}", "messages": ASK, "api_base": f"{url}/v1", "api_key": "none", "seed": 1}
    answer = litellm.completion(**options, tools=[FUNCTION], tool_choice="required")
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Paris", "Oslo")
    answer = litellm.completion(**options, response_format=Forecast)
    Forecast.model_validate_json(answer.choices[0].message.content)


def litellm_anthropic(url: str) -> None:
    answer = litellm.completion(model=f"anthropic/{MODEL}", messages=ASK, api_base=url, api_key="none", max_tokens=8)
    assert answer.usage.completion_tokens <= 8


CHECKS: list[tuple[str, str, Check]] = [
    ("openai", "chat completions, whole and streamed", openai_chat),
    ("openai", "asynchronous, several at once", openai_async),
    ("openai", "`beta.chat.completions.parse`", openai_parse),
    ("openai", "forced tool calls, whole and streamed", openai_tools),
    ("openai", "responses, `previous_response_id`, `responses.parse`", openai_responses),
    ("openai", "`files` and `batches`", openai_batches),
    ("anthropic", "messages, whole and streamed", anthropic_messages),
    ("anthropic", "forced tool calls", anthropic_tools),
    ("langchain-openai", "`ChatOpenAI.invoke` and `stream`", langchain_chat),
    ("langchain-openai", "`bind_tools` with `tool_choice`", langchain_tools),
    ("langchain-openai", "`with_structured_output`, both methods", langchain_structured),
    ("litellm", "`openai/...`, whole and streamed", litellm_chat),
    ("litellm", "`openai/...`, forced tool calls and `response_format`", litellm_tools),
    ("litellm", "`anthropic/...`", litellm_anthropic),
]


def main() -> None:
    url, file = sys.argv[1:]
    results = []
    for package, what, check in CHECKS:
        try:
            check(url)
            problem = ""
        except Exception as err:  # noqa: BLE001 (whatever a client raises is what is reported)
            problem = f"{type(err).__name__}: {err}".splitlines()[0][:200]
        version = importlib.metadata.version(package)
        results.append(json.dumps({"client": f"{package} {version}", "what": what, "problem": problem}))
    Path(file).write_text("\n".join(results))


if __name__ == "__main__":
    main()
