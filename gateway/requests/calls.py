"""Tools of a request: how the model writes calls of them, and whether it must."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpoint.chat_template import ChatTemplate
from echelon.pb.reading_pb2 import (
    CALL_FORM_DEEPSEEK,
    CALL_FORM_HERMES,
    CALL_FORM_LLAMA_JSON,
    CALL_FORM_MISTRAL,
    CALL_FORM_PYTHONIC,
    CALL_FORM_QWEN_XML,
    CALL_FORM_UNSPECIFIED,
    CallForm,
)
from gateway.requests.call_grammars import Tool, calls_grammar, deepseek_tag
from gateway.requests.refusal import invalid, shown

_ANYTHING = {"type": "object"}
# What a template mentions that teaches a form, the most telling words first.
_WORDS = (
    (("<tool_call>", "<function="), CALL_FORM_QWEN_XML),
    (("<tool_call>",), CALL_FORM_HERMES),
    (("[TOOL_CALLS]",), CALL_FORM_MISTRAL),
    ((deepseek_tag("calls_begin"),), CALL_FORM_DEEPSEEK),
    (("<|python_start|>",), CALL_FORM_PYTHONIC),
    (("[func_name1(",), CALL_FORM_PYTHONIC),
    (("<|python_tag|>",), CALL_FORM_LLAMA_JSON),
    (('"parameters": dictionary',), CALL_FORM_LLAMA_JSON),
)
# Tags without which calls of a form are not seen, and a word of the templates of its newer variant.
_TAGS = {CALL_FORM_MISTRAL: "[TOOL_CALLS]", CALL_FORM_DEEPSEEK: deepseek_tag("calls_begin")}


def call_form_of(template: ChatTemplate | None) -> CallForm.ValueType:
    """How a model with this template writes calls, as far as it is known."""
    if template is None:
        return CALL_FORM_UNSPECIFIED
    return next((form for words, form in _WORDS if all(map(template.mentions, words))), CALL_FORM_UNSPECIFIED)


def shows_special_tokens(form: CallForm.ValueType, special_id: Callable[[str], int | None]) -> bool:
    """Whether calls are seen only in a text with special tokens."""
    return form in _TAGS and special_id(_TAGS[form]) is not None


def tools_of(bodies: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """The functions of OpenAI's `tools`. Raises Refusal."""
    return [_tool(f"tools[{i}]", body) for i, body in enumerate(bodies)]


def parameter_types(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Of each tool its parameters, and of each of these its type, as far as they can be read."""
    types: dict[str, dict[str, str]] = {}
    for tool in tools:
        given = tool.get("function")
        function = given if isinstance(given, Mapping) else {}
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if isinstance(properties, Mapping):
            types[str(function.get("name"))] = {
                name: kind
                for name, entry in properties.items()
                if isinstance(entry, Mapping) and isinstance(kind := entry.get("type"), str)
            }
    return types


def forced_calls(
    choice: Any,
    tools: Sequence[Tool],
    template: ChatTemplate,
    *,
    one_call: bool,
    special_id: Callable[[str], int | None],
) -> list[dict[str, Any]]:
    """The grammar of an answer that OpenAI's `tool_choice` forces. Raises Refusal."""
    if not tools:
        raise invalid("tool_choice: needs tools")
    if choice != "required":
        tools, one_call = [_named(choice, tools)], True
    form = call_form_of(template)
    is_newer = template.mentions("[ARGS]") or (form == CALL_FORM_DEEPSEEK and not template.mentions("```json"))
    return calls_grammar(form, tools, one_call=one_call, special_id=special_id, is_newer=is_newer)


def _named(choice: Any, tools: Sequence[Tool]) -> Tool:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise invalid(
            'tool_choice: must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}, got '
            f"{shown(json.dumps(choice))}"
        )
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        raise invalid(f"tool_choice.function.name: {shown(str(name))} is none of tools")
    return tool


def _tool(field: str, body: Mapping[str, Any]) -> Tool:
    if body.get("type", "function") != "function":
        raise invalid(f'{field}.type: must be "function", got {shown(json.dumps(body["type"]))}')
    function = body.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise invalid(f"{field}.function.name: is missing")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _ANYTHING
    if not isinstance(parameters, Mapping):
        raise invalid(f"{field}.function.parameters: must be a JSON schema")
    return Tool(function["name"], parameters, f"{field}.function.parameters")
