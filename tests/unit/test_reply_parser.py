"""What a reply is taken apart into, wherever it is cut."""

import json
import re
from typing import Any

import pytest

from echelon.pb.reading_pb2 import (
    CALL_FORM_DEEPSEEK,
    CALL_FORM_HERMES,
    CALL_FORM_LLAMA_JSON,
    CALL_FORM_MISTRAL,
    CALL_FORM_PYTHONIC,
    CALL_FORM_QWEN_XML,
    CALL_FORM_UNSPECIFIED,
)
from gateway.doors.replies.reply_parser import Argued, Called, Piece, ReplyParser, Said, Thought

A = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}</tool_call>\\""}]}}\n</tool_call>'
B = '<tool_call>{"name":"g","arguments":{}}</tool_call>'


def parser(**options: Any) -> ReplyParser:
    given = {"finds_reasoning": True, "begins_in_reasoning": False, "call_form": CALL_FORM_HERMES, "max_calls": 9}
    return ReplyParser(**{**given, **options})


def told(pieces: list[Piece]) -> dict[str, Any]:
    """What a client has after all pieces; pieces that change nothing are wrong."""
    said, thought, calls = "", "", []
    ids = set()
    for piece in pieces:
        match piece:
            case Said(text):
                assert text
                said += text
            case Thought(text):
                assert text
                thought += text
            case Called(index, name, call_id, arguments):
                assert index == len(calls)
                ids.add(call_id)
                calls.append([name, arguments])
            case Argued(index, arguments):
                assert arguments
                assert index == len(calls) - 1
                calls[index][1] += arguments
    assert len(ids) == len(calls)
    return {"said": said, "thought": thought, "calls": calls}


CASES = [
    ("", "", "", []),
    ("Hello", "Hello", "", []),
    ("  Hello \n", "  Hello \n", "", []),
    ("a < b, a <thin", "a < b, a <thin", "", []),
    ("<think>\nwhy\n</think>\n\nBecause", "Because", "why", []),
    ("\n<think>why</think>", "", "why", []),
    ("<think>\n\n</think>\n\nHi", "Hi", "", []),
    ("<think>never ends \n", "", "never ends \n", []),
    ("Say <think> later", "Say <think> later", "", []),
    (A, "", "", [("f", {"a": [1, {"b": '}</tool_call>"'}]})]),
    (f"<think>x</think>\nI call.\n{A}\n{B}\n", "I call.", "x", [("f", {"a": [1, {"b": '}</tool_call>"'}]}), ("g", {})]),
    (f"{B} and more", "and more", "", [("g", {})]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "h"}</tool_call>', "", "", [("h", {"a": 1})]),
    ('<tool_call>{"name": "h", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [("h", {"a": 1})]),
    ('<tool_call>{"name": "h"}</tool_call>', "", "", [("h", {})]),
    ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", "", []),
    ('<tool_call>["f"]</tool_call>ok', '<tool_call>["f"]</tool_call>ok', "", []),
    ('a <tool_call>{"name": "cut', 'a<tool_call>{"name": "cut', "", []),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}} but goes on', "but goes on", "", [("f", {"a": 1})]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_', "", "", [("f", {"a": 1})]),
]


C = "<|tool_calls_begin|>"
V3 = '<|tool_call_begin|>function<|tool_sep|>f\n```json\n{"a": "}"}\n```<|tool_call_end|>'
V31 = "<|tool_call_begin|>g<|tool_sep|>{}<|tool_call_end|>"
PARAMETERS = "<parameter=s>\n12\n</parameter>\n<parameter=n>\n[1, 2]\n</parameter>\n"
XML = f"<tool_call>\n<function=f>\n{PARAMETERS}</function>\n</tool_call>"
OTHER_FORMS = [
    (CALL_FORM_QWEN_XML, f"I call.\n{XML}\n{XML}!", "I call.!", [("f", {"s": "12", "n": [1, 2]})] * 2),
    (CALL_FORM_QWEN_XML, "<tool_call><function=f></function></tool_call>", "", [("f", {})]),
    (CALL_FORM_QWEN_XML, "<tool_call><function=f><parameter=s>a\nb</parameter>", "", [("f", {"s": "a\nb"})]),
    (CALL_FORM_QWEN_XML, "<tool_call>no</tool_call>x", "<tool_call>no</tool_call>x", []),
    (CALL_FORM_LLAMA_JSON, '{"name": "f", "parameters": {"a": "}; {"}}', "", [("f", {"a": "}; {"})]),
    (CALL_FORM_LLAMA_JSON, '<|python_tag|>{"name": "f", "parameters": {}} ; {"name": "g"}', "", [("f", {}), ("g", {})]),
    (CALL_FORM_LLAMA_JSON, '{"name": "f", "parameters": {}} and', "and", [("f", {})]),
    (CALL_FORM_LLAMA_JSON, '{"name": "f", "parameters": {}}; not', "; not", [("f", {})]),
    (CALL_FORM_LLAMA_JSON, '{"a": 1} is JSON', '{"a": 1} is JSON', []),
    (CALL_FORM_LLAMA_JSON, 'So {"name": "f"}', 'So {"name": "f"}', []),
    (CALL_FORM_LLAMA_JSON, '{"name": "f", "par', '{"name": "f", "par', []),
    (CALL_FORM_LLAMA_JSON, "<|python_", "<|python_", []),
    (
        CALL_FORM_PYTHONIC,
        "[f(a=1, b='x]'), g.h(c=[True, null])]",
        "",
        [("f", {"a": 1, "b": "x]"}), ("g.h", {"c": [True, None]})],
    ),
    (
        CALL_FORM_PYTHONIC,
        '[f(a={"b": "\\"]"}, c=-1.5, d=None)] done',
        "done",
        [("f", {"a": {"b": '"]'}, "c": -1.5, "d": None})],
    ),
    (CALL_FORM_PYTHONIC, "[1, 2] is a list", "[1, 2] is a list", []),
    (CALL_FORM_PYTHONIC, "[f(x)]", "[f(x)]", []),
    (CALL_FORM_PYTHONIC, "Yes [f(a=1)]", "Yes [f(a=1)]", []),
    (
        CALL_FORM_MISTRAL,
        'Hm [TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g"}]',
        "Hm",
        [("f", {"a": "]"}), ("g", {})],
    ),
    (
        CALL_FORM_MISTRAL,
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g-2[CALL_ID]x9[ARGS]{}',
        "",
        [("f", {"a": 1}), ("g-2", {})],
    ),
    (CALL_FORM_MISTRAL, '[TOOL_CALLS]f{"a": 1} end', "end", [("f", {"a": 1})]),
    (CALL_FORM_MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (CALL_FORM_MISTRAL, "[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
    (
        CALL_FORM_DEEPSEEK,
        f"Ok\n{C}{V3}\n{V31}<|tool_calls_end|>",
        "Ok",
        [("f", {"a": "}"}), ("g", {})],
    ),
    (CALL_FORM_DEEPSEEK, f"{C}{V31}", "", [("g", {})]),
    (
        CALL_FORM_DEEPSEEK,
        f"{C}x<|tool_call_end|>{V31}<|tool_calls_end|>y",
        "x<|tool_call_end|>y",
        [("g", {})],
    ),
]


def wide(text: str) -> str:
    """DeepSeek's tags in its own characters."""
    return re.sub(r"<\|(tool_\w+)\|>", lambda tag: f"<\uff5c{tag[1].replace('_', chr(0x2581))}\uff5c>", text)


@pytest.mark.parametrize(("form", "text", "said", "calls"), OTHER_FORMS)
def test_calls_in_other_forms_are_the_same_wherever_they_are_cut(form: Any, text: str, said: str, calls: Any) -> None:
    text, said = wide(text), wide(said)

    def new() -> ReplyParser:
        return parser(call_form=form, parameter_types={"f": {"s": "string", "n": "array"}})

    whole = told(new().feed(f"<think>x</think>{text}", is_last=True))
    assert whole["thought"] == "x"
    assert (whole["said"], [name for name, _ in whole["calls"]]) == (said, [name for name, _ in calls])
    for (_, arguments), (_, expected) in zip(whole["calls"], calls, strict=True):
        assert json.loads(arguments) == expected
    for cut in range(len(text) + 1):
        halves = new()
        pieces = halves.feed(f"<think>x</think>{text[:cut]}") + halves.feed(text[cut:], is_last=True)
        assert told(pieces) == whole, text[:cut]
    one_by_one = new()
    pieces = [piece for char in f"<think>x</think>{text}" for piece in one_by_one.feed(char)]
    assert told(pieces + one_by_one.feed("", is_last=True)) == whole


@pytest.mark.parametrize(("text", "said", "thought", "calls"), CASES)
def test_a_reply_is_the_same_wherever_it_is_cut(text: str, said: str, thought: str, calls: list[Any]) -> None:
    whole = told(parser().feed(text, is_last=True))
    assert (whole["said"], whole["thought"]) == (said, thought)
    assert [(name, json.loads(arguments)) for name, arguments in whole["calls"]] == calls
    for cut in range(len(text) + 1):
        halves = parser()
        assert told(halves.feed(text[:cut]) + halves.feed(text[cut:], is_last=True)) == whole, text[:cut]
    one_by_one = parser()
    pieces = [piece for char in text for piece in one_by_one.feed(char)]
    assert told(pieces + one_by_one.feed("", is_last=True)) == whole


def test_nothing_is_held_that_cannot_be_a_tag() -> None:
    cut = parser()
    assert cut.feed("a <") == [Said("a")]
    assert cut.feed("b") == [Said(" <b")]
    calling = parser()
    calling.feed('<tool_call>{"name": "f", "arguments": {"a": "lo')
    assert calling.feed("ng") == [Argued(0, "ng")], "arguments do not wait for their end"


def test_a_prompt_can_have_opened_the_reasoning() -> None:
    pieces = parser(begins_in_reasoning=True).feed("\nwhy</think>so", is_last=True)
    assert pieces == [Thought("why"), Said("so")]


def test_only_what_is_looked_for_is_found() -> None:
    text = f"<think>x</think>{B}"
    assert parser(finds_reasoning=False, call_form=CALL_FORM_UNSPECIFIED).feed(text, is_last=True) == [Said(text)]
    assert told(parser(max_calls=1).feed(f"{B}{A}end", is_last=True))["calls"] == [["g", "{}"]]


def test_arguments_that_lack_a_bracket_end_with_their_call() -> None:
    pieces = parser().feed('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>after', is_last=True)
    assert told(pieces) == {"said": "after", "thought": "", "calls": [["f", '{"a": 1']]}


@pytest.mark.parametrize("number", ["1e999", "0x" + "f" * 5000])
def test_a_number_that_json_cannot_hold_makes_no_call(number: str) -> None:
    text = f"[f(a={number})]"
    reply = parser(call_form=CALL_FORM_PYTHONIC, finds_reasoning=False).feed(text, is_last=True)
    assert told(reply)["said"] == text
