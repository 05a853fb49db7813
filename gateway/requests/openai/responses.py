"""The body of /v1/responses, as the conversation of /v1/chat/completions that means the same."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import grpc
from pydantic import Field

from checkpoint.chat_template import ChatTemplate
from gateway.requests.openai.bodies import ApiObject, ChatBody, ignored_fields, parse_body
from gateway.requests.openai.chat import SpecialId, ask_conversation
from gateway.requests.openai.reading import Asked
from gateway.requests.refusal import Refusal, invalid, shown

_WORDS = (
    ("max_tokens:", "max_output_tokens:"),
    ("messages:", "input:"),
    ("response_format.json_schema.", "text.format."),
)
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
_Int = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
# Fields that would change what happens and have no effect here.
_UNSUPPORTED = ("background", "conversation", "prompt", "max_tool_calls")


class ResponseBody(ApiObject):
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: _Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    top_k: _Int | None = None  # of ours, as are the following
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    speculation: dict[str, Any] | None = None
    cache_salt: str | None = None
    attention: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


_SAME_NAMES = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "top_k", "min_p", "seed", "stop", "ignore_eos",
    "speculation", "cache_salt", "attention", "chat_template_kwargs",
)  # fmt: skip


def join_request(earlier: Mapping[str, str], data: bytes) -> bytes:
    """A body with the conversations that it may continue, by the ids of their last responses; each is JSON items."""
    return json.dumps(earlier).encode() + b"\n" + data


def ask_response(data: bytes, template: ChatTemplate | None, special_id: SpecialId) -> Asked:
    """`data` is of `join_request`. Raises Refusal."""
    earlier, _, own = data.partition(b"\n")
    body = parse_body(ResponseBody, own)
    for name in _UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise invalid(f"{name}: is not supported by this server, leave it out")
    items = [*_earlier_items(body.previous_response_id, json.loads(earlier)), *_items(body.input)]
    fields = {name: getattr(body, name) for name in _SAME_NAMES}
    fields |= {
        "messages": _messages(body.instructions, items),
        "max_tokens": body.max_output_tokens,
        "tools": [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools)] if body.tools else None,
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _response_format(body.text),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    asked = ask_conversation(parse_body(ChatBody, json.dumps(given).encode()), template, special_id, _WORDS)
    presentation = asked.presentation
    presentation.response.fields = json.dumps(_repeated(body))
    presentation.response.items = json.dumps(items)
    presentation.response.stores = body.store is not False
    del presentation.ignored_fields[:]
    presentation.ignored_fields.extend(ignored_fields(body))
    return asked


def _earlier_items(response_id: str | None, earlier: Mapping[str, str]) -> list[dict[str, Any]]:
    if response_id is None:
        return []
    if response_id not in earlier:
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            f"previous_response_id: {shown(response_id)} is not known; responses are kept in memory, for an hour",
        )
    items: list[dict[str, Any]] = json.loads(earlier[response_id])
    return items


def _items(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else list(given)


def _messages(instructions: str | None, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for i, item in enumerate(items):
        field = f"input[{i}]"
        match item.get("type", "message"):
            case "message":
                message = {"role": str(item.get("role")), "content": _text(item.get("content"), f"{field}.content")}
                _add(messages, message)
            case "reasoning":
                thought = _text(item.get("content") or item.get("summary") or "", f"{field}.content")
                _add(messages, {"role": "assistant", "content": "", "reasoning_content": thought})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                _add(messages, {"role": "assistant", "content": "", "tool_calls": [call]})
            case "function_call_output":
                output = _text(item.get("output"), f"{field}.output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
            case kind:
                raise invalid(f"{field}.type: {shown(json.dumps(kind))} is not supported by this server")
    return messages


def _add(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """What an assistant says, thinks and calls in a row is one message of a template."""
    if not messages or message["role"] != "assistant" or messages[-1]["role"] != "assistant":
        messages.append(message)
        return
    last = messages[-1]
    last["content"] += message["content"]
    for name in ("tool_calls", "reasoning_content"):
        if name in message:
            last[name] = last[name] + message[name] if name in last else message[name]


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{field}: must be a text or a list of parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise invalid(f"{field}[{i}].type: must be input_text or output_text, got {shown(json.dumps(part))}")
        texts.append(str(part.get("text", part.get("refusal", ""))))
    return "\n".join(texts)


def _tool(field: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise invalid(f'{field}.type: must be "function", got {shown(json.dumps(tool.get("type")))}')
    function = {
        name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    wanted = (text or {}).get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}


def _repeated(body: ResponseBody) -> dict[str, Any]:
    """What the answer says of its request."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": "disabled",
    }
