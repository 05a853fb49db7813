"""A model's reply as it comes: what it thinks, what it says, and which tools it calls.

Reasoning stands between <think> and </think>. Calls in the form of Hermes and Qwen models,
<tool_call>{"name": ..., "arguments": {...}}</tool_call>, are passed on as they grow, those in other forms when they are
complete (call_readers.py). Whatever follows no form is content. Where the text was cut changes the borders of the
pieces that come out, and nothing else.
"""

import enum
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from echelon.pb.reading_pb2 import (
    CALL_FORM_DEEPSEEK,
    CALL_FORM_HERMES,
    CALL_FORM_LLAMA_JSON,
    CALL_FORM_MISTRAL,
    CALL_FORM_PYTHONIC,
    CALL_FORM_QWEN_XML,
    CallForm,
)
from gateway.doors.replies.call_readers import CallReader, NoCallError, ParameterTypes, reader_of
from gateway.requests.call_grammars import deepseek_tag

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_TAGS = {
    CALL_FORM_HERMES: _CALL,
    CALL_FORM_QWEN_XML: _CALL,
    CALL_FORM_MISTRAL: "[TOOL_CALLS]",
    CALL_FORM_DEEPSEEK: deepseek_tag("calls_begin"),
}
# What calls begin with where no tag must come first: a tag that may, and a bracket.
_OPENINGS = {CALL_FORM_LLAMA_JSON: ("<|python_tag|>", "{"), CALL_FORM_PYTHONIC: ("<|python_start|>", "[")}
# A call whose arguments can be passed on before they are complete.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class Said:
    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """The beginning of a call, and as much of its arguments as is there."""

    index: int
    name: str
    call_id: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the arguments of a call."""

    index: int
    arguments: str


Piece = Said | Thought | Called | Argued


class _State(enum.Enum):
    START = enum.auto()  # reasoning may begin
    REASONING = enum.auto()
    CONTENT = enum.auto()
    CALL = enum.auto()  # before its arguments
    ARGUMENTS = enum.auto()
    CALLED = enum.auto()  # after them
    ANSWER = enum.auto()  # calls may begin, without a tag
    READING = enum.auto()  # a reader looks for calls


def _random_call_id(number: int) -> str:
    return f"call_{secrets.token_hex(12)}"


class ReplyParser:
    """`feed` with one text after the other, the last one with `is_last`."""

    def __init__(
        self,
        *,
        finds_reasoning: bool,
        begins_in_reasoning: bool,
        call_form: "CallForm.ValueType",
        max_calls: int,
        parameter_types: ParameterTypes | None = None,
        call_id: Callable[[int], str] = _random_call_id,
    ) -> None:
        """`max_calls`: further ones are dropped. `parameter_types`: of the tools, for forms that do not show them.
        `call_id`: the id of the call with this number."""
        self.num_calls = 0
        self._call_id = call_id
        self._max_calls = max_calls
        self._call_form = call_form
        self._tag = _TAGS.get(call_form, "")
        self._types = parameter_types or {}
        self._reader: CallReader | None = None
        self._read = ""  # by the reader, and its tag
        self._content = _State.ANSWER if call_form in _OPENINGS else _State.CONTENT  # what follows reasoning
        self._held = ""
        self._skips_space = begins_in_reasoning  # what is next stands beside a tag
        self._arguments = _ObjectScanner()
        self._state = _State.START if finds_reasoning else self._content
        if begins_in_reasoning:
            self._state = _State.REASONING

    def feed(self, text: str, *, is_last: bool = False) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        before = None
        while before != (self._state, self._held):  # until nothing moves
            before = (self._state, self._held)
            pieces.extend(self._step(is_last))
        return pieces

    def _step(self, is_last: bool) -> Iterator[Piece]:
        match self._state:
            case _State.START:
                self._start(is_last)
            case _State.REASONING:
                yield from map(Thought, self._take_until(_END_THINK, self._content, is_last))
            case _State.ANSWER:
                self._answer(is_last)
            case _State.CONTENT:
                yield from self._say(is_last)
            case _State.READING:
                yield from self._read_calls(is_last)
            case _State.CALL:
                yield from self._begin_call(is_last)
            case _State.ARGUMENTS:
                yield from self._argue()
            case _State.CALLED:
                self._end_call(is_last)

    def _start(self, is_last: bool) -> None:
        held = self._held.lstrip()
        if held.startswith(_THINK):
            self._held = held.removeprefix(_THINK)
            self._state, self._skips_space = _State.REASONING, True
        elif is_last or not _THINK.startswith(held):
            self._state = self._content

    def _answer(self, is_last: bool) -> None:
        """Calls without a tag stand where the answer begins."""
        tag, bracket = _OPENINGS[self._call_form]
        held = self._held.lstrip()
        behind = held.removeprefix(tag).lstrip()
        if behind.startswith(bracket):
            self._open(held[: len(held) - len(behind)], behind)
        elif is_last or (behind and not tag.startswith(held)):
            self._state = _State.CONTENT

    def _say(self, is_last: bool) -> Iterator[Piece]:
        is_hermes = self._call_form == CALL_FORM_HERMES
        yield from map(Said, self._take_until(self._tag, _State.CALL if is_hermes else _State.READING, is_last))
        if self._state is _State.READING:
            self._open(self._tag, self._held)

    def _open(self, tag: str, text: str) -> None:
        self._reader = reader_of(self._call_form, self._types)
        self._read, self._held, self._state = tag, text, _State.READING

    def _read_calls(self, is_last: bool) -> Iterator[Piece]:
        assert self._reader is not None, "calls have begun"
        text, self._held = self._held, ""
        self._read += text
        try:
            found = self._reader.feed(text, is_last=is_last)
        except NoCallError:
            tag = self._tag or self._read  # what stands behind a tag may hold another
            yield Said(tag)
            self._held, self._state, self._skips_space = self._read[len(tag) :], _State.CONTENT, False
            return
        for item in found.items:
            if isinstance(item, str):
                yield Said(item)
            else:
                yield from self._call(item.name, item.arguments)
        if found.rest is not None:
            self._held, self._state, self._skips_space = found.rest, _State.CONTENT, True

    def _take_until(self, tag: str, then: _State, is_last: bool) -> Iterator[str]:
        """The text before the tag, without the space beside tags. An empty tag never comes."""
        before, found, after = self._held.partition(tag) if tag else (self._held, "", "")
        if self._skips_space:
            before = before.lstrip()
        if found:
            end = len(before.rstrip())
        else:
            end = len(before) if is_last or not tag else _num_certain(before, tag)
        if end > 0:
            self._skips_space = False
            yield before[:end]
        self._held = after if found else before[end:]
        if found:
            self._state, self._skips_space = then, True

    def _begin_call(self, is_last: bool) -> Iterator[Piece]:
        body, closed, after = self._held.partition(_END_CALL)
        head = _HEAD.match(body)
        if head is not None:
            self._held = self._held[head.end() :]
            self._state, self._arguments = _State.ARGUMENTS, _ObjectScanner()
            yield from self._call(head[1], "")
        elif closed or is_last:
            self._held = after
            self._state, self._skips_space = _State.CONTENT, True
            yield from self._whole_call(body, closed)

    def _whole_call(self, body: str, closed: str) -> Iterator[Piece]:
        """One that is written in another order, or is none."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            call = None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            yield Said(_CALL + body + closed)
            return
        arguments = call.get("arguments") or {}
        yield from self._call(call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))

    def _call(self, name: str, arguments: str) -> Iterator[Piece]:
        if self.num_calls < self._max_calls:
            yield Called(self.num_calls, name, self._call_id(self.num_calls), arguments)
        self.num_calls += 1

    def _argue(self) -> Iterator[Piece]:
        num_chars, has_ended = self._arguments.scan(self._held)
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if text and self.num_calls <= self._max_calls:
            yield Argued(self.num_calls - 1, text)
        if has_ended:
            self._state = _State.CALLED

    def _end_call(self, is_last: bool) -> None:
        """A call that is not closed ends with its arguments."""
        held = self._held.lstrip().removeprefix("}").lstrip()
        is_tag = held.startswith(_END_CALL)
        if is_tag or is_last or not _END_CALL.startswith(held):
            is_cut = is_last and _END_CALL.startswith(held)
            self._held = "" if is_cut else held.removeprefix(_END_CALL)
            self._state, self._skips_space = _State.CONTENT, True


class _ObjectScanner:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str) -> tuple[int, bool]:
        """How many more characters belong to it, and whether it ends with them."""
        for i, char in enumerate(text):
            if self._in_string:
                self._scan_string(char)
            elif char == "<":  # the end of the call, of which a bracket is missing
                return i, True
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1, True
        return len(text), False

    def _scan_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False


def _num_certain(text: str, tag: str) -> int:
    """How many characters are neither the beginning of the tag nor space before it."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return len(text[:-size].rstrip())
    return len(text.rstrip())
