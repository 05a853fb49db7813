"""The body of Anthropic's /v1/messages, as the conversation of OpenAI's API that means the same."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from checkpoint.chat_template import ChatTemplate
from gateway.requests.openai.bodies import ApiObject, ChatBody, ChatFields, parse_body
from gateway.requests.openai.chat import SpecialId, ask_conversation
from gateway.requests.openai.reading import Asked
from gateway.requests.refusal import Refusal, invalid, shown

_WORDS = (("messages:", "messages:"), ("stop[", "stop_sequences["), ("stop:", "stop_sequences:"))
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_Int = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


class MessageBody(ApiObject):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class ToolBody(ApiObject):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class PromptBody(ApiObject):
    """What makes a prompt."""

    model: str | None = None
    messages: list[MessageBody]
    system: str | list[dict[str, Any]] | None = None
    tools: list[ToolBody] | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # of ours


class MessagesBody(PromptBody):
    max_tokens: _Int
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # the former name of a part of it
    seed: int | None = None  # of ours, as are the following
    speculation: dict[str, Any] | None = None
    cache_salt: str | None = None
    attention: dict[str, Any] | None = None


def ask_messages(data: bytes, template: ChatTemplate | None, special_id: SpecialId) -> Asked:
    """Raises Refusal."""
    body = parse_body(MessagesBody, data)
    choice, one_call = _tool_choice(body.tool_choice)
    fields = {
        **_prompt_fields(body),
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "tool_choice": choice,
        "parallel_tool_calls": not one_call,
        "response_format": _response_format(body),
        "seed": body.seed,
        "speculation": body.speculation,
        "cache_salt": body.cache_salt,
        "attention": body.attention,
    }
    return ask_conversation(_chat_body(ChatBody, fields), template, special_id, _WORDS)


def prompt_of(data: bytes) -> tuple[ChatFields, str | None]:
    """The conversation of a body whose tokens are counted, and the model. Raises Refusal."""
    body = parse_body(PromptBody, data)
    return _chat_body(ChatFields, _prompt_fields(body)), body.model


def _chat_body(body_class: type[Any], fields: Mapping[str, Any]) -> Any:
    given = {name: value for name, value in fields.items() if value is not None}
    return parse_body(body_class, json.dumps(given).encode())


def _prompt_fields(body: PromptBody) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        variables.setdefault("enable_thinking", body.thinking.get("type") != "disabled")
    messages = list(_messages(body))
    return {
        "model": body.model,
        "messages": messages,
        "continue_final_message": (bool(body.messages) and body.messages[-1].role == "assistant") or None,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "chat_template_kwargs": variables or None,
    }


def _tool(tool: ToolBody) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema or {}}
    return {"type": "function", "function": function}


def _tool_choice(choice: Mapping[str, Any] | None) -> tuple[Any, bool]:
    """OpenAI's tool_choice, and whether one call at most is allowed."""
    if choice is None:
        return None, False
    one_call, kind = bool(choice.get("disable_parallel_tool_use")), choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, True
    if kind not in _CHOICES:
        raise invalid(f"tool_choice.type: must be auto, any, tool or none, got {shown(json.dumps(kind))}")
    return _CHOICES[kind], one_call


def _response_format(body: MessagesBody) -> dict[str, Any] | None:
    wanted = (body.output_config or {}).get("format") or body.output_format
    if wanted is None:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        raise invalid('output_config.format.type: must be "json_schema"')
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}


def _messages(body: PromptBody) -> Iterator[dict[str, Any]]:
    if body.system:
        yield {"role": "system", "content": _text(body.system, "system")}
    for i, message in enumerate(body.messages):
        blocks = message.content
        if isinstance(blocks, str):
            yield {"role": message.role, "content": blocks}
        elif message.role == "assistant":
            yield _said_by_assistant(blocks, f"messages[{i}].content")
        else:
            yield from _said_by_user(message.role, blocks, f"messages[{i}].content")


def _said_by_assistant(blocks: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any]:
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(blocks):
        match block.get("type"):
            case "text":
                texts.append(str(block.get("text", "")))
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                pass
            case "tool_use":
                function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case kind:
                raise _unknown(f"{field}[{i}]", kind, "text, thinking or tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _said_by_user(role: str, blocks: Sequence[Mapping[str, Any]], field: str) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own."""
    texts = list[str]()
    for i, block in enumerate(blocks):
        match block.get("type"):
            case "text":
                texts.append(str(block.get("text", "")))
            case "tool_result":
                content = _text(block.get("content") or "", f"{field}[{i}].content")
                yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            case kind:
                raise _unknown(f"{field}[{i}]", kind, "text or tool_result")
    if texts:
        yield {"role": role, "content": "\n".join(texts)}


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid(f"{field}: must be a text or a list of blocks")
    for i, block in enumerate(content):
        if block.get("type") != "text":
            raise _unknown(f"{field}[{i}]", block.get("type"), "text")
    return "\n".join(str(block.get("text", "")) for block in content)


def _unknown(field: str, kind: Any, wanted: str) -> Refusal:
    return invalid(f"{field}.type: must be {wanted}, got {shown(json.dumps(kind))}")
