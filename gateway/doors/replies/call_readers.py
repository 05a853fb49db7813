"""Calls of tools in the text of a reply, each form as the models that write it do.

A reader gets the text behind the tag with which calls begin, piece by piece. It holds back what is not complete.
"""

import ast
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from echelon.pb import reading_pb2
from gateway.requests.call_grammars import deepseek_tag


class Call(NamedTuple):
    name: str
    arguments: str  # a JSON object


class Found(NamedTuple):
    """What a reader has found."""

    items: list[Call | str]  # a str is text that looked like a call
    rest: str | None  # the text behind the calls; None: more may come


class NoCallError(Exception):
    """The text is no call. The reader has not taken it."""


class CallReader(Protocol):
    def feed(self, text: str, *, is_last: bool) -> Found:
        """Raises NoCallError, after which the reader is not used any more; `text` of all calls is then content."""


ParameterTypes = Mapping[str, Mapping[str, str]]  # of each tool: its parameters and their types in JSON's words


class TaggedReader:
    """Each call stands between tags. Where `all_end` is another tag than `end`, it ends them all."""

    def __init__(self, *, begin: str, end: str, all_end: str, parse: Callable[[str], Call]) -> None:
        """`begin`: the tag before the text that the reader gets."""
        self._begin, self._end, self._all_end, self._parse = begin, end, all_end, parse
        self._held = ""

    def feed(self, text: str, *, is_last: bool) -> Found:
        self._held += text
        items: list[Call | str] = []
        while True:
            body, found, after = self._held.partition(self._end)
            if not found:
                break
            items.append(self._call(body, self._end))
            self._held = after
            if self._all_end == self._end:
                return Found(items, after)
        body, found, after = self._held.partition(self._all_end)
        if not found and not is_last:
            return Found(items, None)
        if body.strip() and not self._all_end.startswith(body.strip()):
            items.append(self._call(body, found))
        return Found(items, after)

    def _call(self, body: str, end: str) -> Call | str:
        try:
            return self._parse(body)
        except NoCallError:
            return self._begin + body + end


class JsonReader:
    """JSON values one behind the other, with `between` before each further one. `head`: what stands before a value."""

    def __init__(
        self, *, head: re.Pattern[str], between: str, parse: Callable[["re.Match[str]", Any], list[Call]]
    ) -> None:
        self._head, self._between, self._parse = head, between, parse
        self._held = ""
        self._match: re.Match[str] | None = None
        self._value = BalancedText('"')
        self._is_first = True

    def feed(self, text: str, *, is_last: bool) -> Found:
        self._held += text
        items: list[Call | str] = []
        while self._match is not None or self._begin():
            assert self._match is not None, "a value has begun"
            end = self._value.end_of(self._held, self._match.end())
            if end is None and not is_last:
                return Found(items, None)
            try:
                items += self._parse(self._match, _loads(self._held[self._match.end() : end]))
            except NoCallError:
                if self._is_first:
                    raise
                return Found(items, self._held)
            self._held, self._match, self._is_first = self._held[end:], None, False
        return self._pause(items, is_last)

    def _begin(self) -> bool:
        """Whether another value begins here."""
        held = self._held.lstrip()
        if not self._is_first:
            if not held.startswith(self._between):
                return False
            held = held[len(self._between) :].lstrip()
        self._match = self._head.match(held)
        if self._match is not None:
            self._held, self._value = held, BalancedText('"')
        return self._match is not None

    def _pause(self, items: list[Call | str], is_last: bool) -> Found:
        """No value has begun; perhaps one will."""
        held = self._held.lstrip()
        if self._is_first:
            if is_last or (held and not _may_become(self._head, held)):
                raise NoCallError
            return Found(items, None)
        behind = held[len(self._between) :] if held.startswith(self._between) else None
        open_ = self._between.startswith(held) if behind is None else _may_become(self._head, behind.lstrip())
        return Found(items, None if open_ and not is_last else self._held)


class PythonReader:
    """A list of calls in Python's words, as in [f(a=1), g(b="x")]."""

    def __init__(self) -> None:
        self._held = ""
        self._list = BalancedText("\"'")

    def feed(self, text: str, *, is_last: bool) -> Found:
        self._held += text
        end = self._list.end_of(self._held, 0)
        if end is None:
            if is_last:
                raise NoCallError
            return Found([], None)
        return Found([*_python_calls(self._held[:end])], self._held[end:])


class BalancedText:
    """Finds where the brackets of a growing text are closed that it begins with."""

    def __init__(self, quotes: str) -> None:
        self._quotes = quotes
        self._quote = ""  # that is open
        self._is_escaped = False
        self._depth = 0
        self._num_seen = 0

    def end_of(self, text: str, start: int) -> int | None:
        """The place behind the last bracket; `text[start:]` has grown since the last call."""
        for i in range(start + self._num_seen, len(text)):
            self._num_seen += 1
            char = text[i]
            if self._quote:
                self._in_quotes(char)
            elif char in self._quotes:
                self._quote = char
            elif char in "{[(":
                self._depth += 1
            elif char in "}])":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None

    def _in_quotes(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == self._quote:
            self._quote = ""


def reader_of(form: "reading_pb2.CallForm.ValueType", types: ParameterTypes) -> CallReader:
    match form:
        case reading_pb2.CALL_FORM_QWEN_XML:
            begin, end = "<tool_call>", "</tool_call>"
            return TaggedReader(begin=begin, end=end, all_end=end, parse=lambda body: _qwen_call(body, types))
        case reading_pb2.CALL_FORM_DEEPSEEK:
            return TaggedReader(
                begin="", end=deepseek_tag("call_end"), all_end=deepseek_tag("calls_end"), parse=_deepseek_call
            )
        case reading_pb2.CALL_FORM_MISTRAL:
            return JsonReader(head=_MISTRAL_HEAD, between="[TOOL_CALLS]", parse=_mistral_calls)
        case reading_pb2.CALL_FORM_LLAMA_JSON:
            return JsonReader(head=_LLAMA_HEAD, between=";", parse=lambda head, value: [_json_call(value)])
    return PythonReader()


_MISTRAL_HEAD = re.compile(r"(?=\[\s*\{)|([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\{)")
_LLAMA_HEAD = re.compile(r"(?=\{)")
_HEADS_BEGIN = {
    _MISTRAL_HEAD: re.compile(r"\[\s*|[\w.-]+(\[([A-Z_]*(\]\w*(\[[A-Z]*\]?)?)?)?)?"),
    _LLAMA_HEAD: re.compile(r""),
}


def _may_become(head: re.Pattern[str], text: str) -> bool:
    """Whether more text can make it begin with `head`."""
    return not text or _HEADS_BEGIN[head].fullmatch(text) is not None


def _mistral_calls(head: "re.Match[str]", value: Any) -> list[Call]:
    if head[1] is None:
        return [_json_call(item) for item in value]
    return [Call(head[1], json.dumps(value))]


def _json_call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise NoCallError
    arguments = value.get("arguments", value.get("parameters")) or {}
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise NoCallError from err


_DEEPSEEK = re.compile(
    r"\s*{begin}(?:function{sep}([^\n]+)\n```json\n(.*?)\n?```|(.+?){sep}(.*))\s*".format(
        begin=deepseek_tag("call_begin"), sep=deepseek_tag("sep")
    ),
    re.S,
)


def _deepseek_call(body: str) -> Call:
    """Of V3 and R1, or of V3.1."""
    found = _DEEPSEEK.fullmatch(body)
    if found is None:
        raise NoCallError
    return Call((found[1] or found[3]).strip(), json.dumps(_loads(found[2] or found[4] or "{}")))


_QWEN = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*(?:</function>\s*)?", re.S)
_QWEN_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)(?:\n?</parameter>|\Z)", re.S)


def _qwen_call(body: str, types: ParameterTypes) -> Call:
    found = _QWEN.fullmatch(body)
    if found is None:
        raise NoCallError
    own = types.get(found[1], {})
    values = {name: _typed(text, own.get(name, "")) for name, text in _QWEN_PARAMETER.findall(found[2])}
    return Call(found[1], json.dumps(values))


def _typed(text: str, kind: str) -> Any:
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _python_calls(text: str) -> list[Call]:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise NoCallError from err
    if not isinstance(tree, ast.List) or not tree.elts:
        raise NoCallError
    return [_python_call(node, text) for node in tree.elts]


def _python_call(node: ast.expr, text: str) -> Call:
    if not isinstance(node, ast.Call) or node.args or not all(keyword.arg for keyword in node.keywords):
        raise NoCallError
    values = {str(keyword.arg): _python_value(keyword.value, text) for keyword in node.keywords}
    try:
        return Call(ast.unparse(node.func), json.dumps(values, allow_nan=False))
    except ValueError as err:  # infinity, or an integer with too many digits
        raise NoCallError from err


_JSON_NAMES = {"true": True, "false": False, "null": None}


def _python_value(node: ast.expr, text: str) -> Any:
    """Written as in Python or as in JSON."""
    match node:
        case ast.Constant(value=str(value)):
            with contextlib.suppress(ValueError):  # JSON has other escapes
                return json.loads(ast.get_source_segment(text, node) or "")
            return value
        case ast.Constant(value=bool() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python_value(item, text) for item in items]
        case ast.Dict(keys=keys, values=values) if all(keys):
            pairs = zip(keys, values, strict=True)
            return {str(_python_value(key, text)): _python_value(value, text) for key, value in pairs if key}
    raise NoCallError
