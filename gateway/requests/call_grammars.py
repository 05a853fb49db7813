"""Grammars of calls of tools, in each form in which models write them; they agree with the readers of the replies."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from echelon.pb import reading_pb2
from echelon.pb.reading_pb2 import CallForm
from gateway.requests.grammar import schema_grammar
from gateway.requests.refusal import invalid


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: Mapping[str, Any]  # a JSON schema
    field: str  # where the client has given it


@dataclass(slots=True)
class _Grammar:
    """Lark's rules of calls, and the grammars of JSON that they refer to."""

    special_id: Callable[[str], int | None]  # of texts that are special tokens
    rules: list[str] = field(default_factory=list)
    schemas: list[dict[str, Any]] = field(default_factory=list)

    def tag(self, text: str) -> str:
        token_id = self.special_id(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    def value(self, schema: Any, place: str) -> str:
        """JSON that follows a schema, as a term of Lark's."""
        name = f"json_{len(self.schemas)}"
        self.schemas.append({**schema_grammar(schema, place), "name": name})
        return f"@{name}"

    def rule(self, text: str) -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}: {text}")
        return name

    def finished(self, start: str) -> list[dict[str, Any]]:
        return [{"lark_grammar": "\n".join([f"start: {start}", *self.rules])}, *self.schemas]


def calls_grammar(
    form: CallForm.ValueType,
    tools: Sequence[Tool],
    *,
    one_call: bool,
    special_id: Callable[[str], int | None] = lambda text: None,
    is_newer: bool = False,
) -> list[dict[str, Any]]:
    """A grammar of one or more calls, in llguidance's words. `is_newer`: of two variants of a form. Raises Refusal."""
    grammar = _Grammar(special_id)
    match form:
        case reading_pb2.CALL_FORM_HERMES:
            calls, around = [_hermes(grammar, tool) for tool in tools], ("", "\n", "")
        case reading_pb2.CALL_FORM_QWEN_XML:
            calls, around = [_qwen(grammar, tool) for tool in tools], ("", "\n", "")
        case reading_pb2.CALL_FORM_LLAMA_JSON:
            calls, around = [_json(grammar, tool, "parameters") for tool in tools], ("", "; ", "")
        case reading_pb2.CALL_FORM_PYTHONIC:
            calls, around = [_python(grammar, tool) for tool in tools], ("[", ", ", "]")
        case reading_pb2.CALL_FORM_MISTRAL if is_newer:
            calls, around = [_mistral(grammar, tool) for tool in tools], ("", "", "")
        case reading_pb2.CALL_FORM_MISTRAL:
            calls, around = [_json(grammar, tool, "arguments") for tool in tools], ("[", ", ", "]")
        case _:
            calls, around = [_deepseek(grammar, tool, is_newer=is_newer) for tool in tools], ("", "\n", "")
    call = grammar.rule(" | ".join(calls))
    before, between, after = (json.dumps(text) if text else "" for text in around)
    further = "" if one_call else f" ({between} {call})*"
    start = f"{before} {call}{further} {after}"
    if form == reading_pb2.CALL_FORM_MISTRAL and not is_newer:
        start = f"{grammar.tag('[TOOL_CALLS]')} {start}"
    if form == reading_pb2.CALL_FORM_DEEPSEEK:
        start = f"{grammar.tag(deepseek_tag('calls_begin'))} {start} {grammar.tag(deepseek_tag('calls_end'))}"
    return grammar.finished(start)


def deepseek_tag(name: str) -> str:
    """With the wide bars and thick underscores of DeepSeek's vocabulary."""
    return f"<|tool_{name}|>".replace("|", "\uff5c").replace("_", "\u2581")


def _json(grammar: _Grammar, tool: Tool, arguments: str) -> str:
    head = json.dumps('{"name": ' + json.dumps(tool.name) + f', "{arguments}": ')
    return grammar.rule(f'{head} {grammar.value(tool.parameters, tool.field)} "}}"')


def _hermes(grammar: _Grammar, tool: Tool) -> str:
    return grammar.rule(rf'"<tool_call>\n" {_json(grammar, tool, "arguments")} "\n</tool_call>"')


def _mistral(grammar: _Grammar, tool: Tool) -> str:
    tags = grammar.tag("[TOOL_CALLS]"), grammar.tag("[ARGS]")
    return grammar.rule(f"{tags[0]} {json.dumps(tool.name)} {tags[1]} {grammar.value(tool.parameters, tool.field)}")


def _deepseek(grammar: _Grammar, tool: Tool, *, is_newer: bool) -> str:
    begin, sep, end = (grammar.tag(deepseek_tag(name)) for name in ("call_begin", "sep", "call_end"))
    name, value = json.dumps(tool.name), grammar.value(tool.parameters, tool.field)
    if is_newer:
        return grammar.rule(f"{begin} {name} {sep} {value} {end}")
    return grammar.rule(rf'{begin} "function" {sep} {name} "\n```json\n" {value} "\n```" {end}')


def _properties(tool: Tool) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it is required; the required ones first."""
    own, required = tool.parameters.get("properties") or {}, tool.parameters.get("required") or []
    if not isinstance(own, Mapping) or not isinstance(required, list):
        raise invalid(f"{tool.field}: must describe an object")
    shared = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}
    found = [
        (name, {**schema, **shared} if isinstance(schema, Mapping) else schema, name in required)
        for name, schema in own.items()
    ]
    return sorted(found, key=lambda entry: not entry[2])


def _qwen(grammar: _Grammar, tool: Tool) -> str:
    parts = [json.dumps(f"<tool_call>\n<function={tool.name}>\n")]
    for name, schema, is_required in _properties(tool):
        part = f"{json.dumps(f'<parameter={name}>' + chr(10))} {_qwen_value(grammar, schema, tool, name)}"
        parts.append(part if is_required else f"({part})?")
    return grammar.rule(" ".join([*parts, r'"</function>\n</tool_call>"']))


def _qwen_value(grammar: _Grammar, schema: Any, tool: Tool, name: str) -> str:
    """With its closing tag. Texts are written as they are."""
    close = "\n</parameter>\n"
    if not isinstance(schema, Mapping) or schema.get("type") != "string":
        return f"{grammar.value(schema, f'{tool.field}.properties.{name}')} {json.dumps(close)}"
    if isinstance(texts := schema.get("enum"), list):
        return f"({' | '.join(json.dumps(str(text)) for text in texts)}) {json.dumps(close)}"
    if "maxLength" in schema:  # nothing else can tell where such a text ends
        size = f"{{{int(schema.get('minLength', 0))},{int(schema['maxLength'])}}}"
        return rf"/[^<]{size}\n<\/parameter>\n/"
    rule = f"text_{len(grammar.rules)}"
    grammar.rules.append(f"{rule}[suffix={json.dumps(close)}]: /(.|\\n)*/")
    return rule


def _python(grammar: _Grammar, tool: Tool) -> str:
    required, optional = list[str](), list[str]()
    for name, schema, is_required in _properties(tool):
        if not name.isidentifier():
            raise invalid(f"{tool.field}.properties: {name!r} cannot be written in Python, as this model writes calls")
        value = grammar.value(schema, f"{tool.field}.properties.{name}")
        (required if is_required else optional).append(f"{json.dumps(f'{name}=')} {value}")
    if not required and optional:
        first, *rest = optional
        inside = f"({' '.join([first, *_further(rest)])})?"
    else:
        inside = " ".join([' ", " '.join(required), *_further(optional)])
    return grammar.rule(f'{json.dumps(f"{tool.name}(")} {inside} ")"')


def _further(parts: Sequence[str]) -> list[str]:
    return [f'(", " {part})?' for part in parts]
