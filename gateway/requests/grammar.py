"""A form that an output shall keep to, as a grammar for llguidance; what that cannot compile is refused by name.

The tables of a grammar are made in the workers, for the model's tokens. Here it is only read, which needs no tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from childproc.request_limits import MAX_GRAMMAR_BYTES
from echelon.pb.inference_pb2 import StructuredOutput
from echelon.pb.reading_pb2 import REASONING_BEGUN, REASONING_POSSIBLE, Reasoning
from gateway.requests.refusal import invalid

_FIELD = "structured_output"
# A model that may write spaces for ever sometimes does; nobody indents further than this.
_WHITESPACE = r"[ \n\r\t]{0,40}"
_STARTS = {
    REASONING_POSSIBLE: "start: reasoning SPACE? @answer | @answer",
    REASONING_BEGUN: "start: thought SPACE? @answer",
}
_REASONING = r"""
reasoning: /\s{0,8}<think>/ thought
thought[suffix="</think>"]: /(.|\n)*/
SPACE: /\s{1,8}/
"""


def grammar_of(wanted: StructuredOutput, reasoning: Reasoning.ValueType) -> str:
    """The source for the workers: the answer keeps to the form, and reasoning before it is free.

    What this costs depends on the client's text. Raises Refusal naming the field.
    """
    form = wanted.WhichOneof("form")
    if form is None:
        raise invalid(f"{_FIELD}: one of json_schema, json_object, regex, grammar and choice is needed")
    answer, field = _ANSWERS[form](getattr(wanted, form)), f"{_FIELD}.{form}"
    source = composed([answer], reasoning, field=field)
    _check(source, field)
    return source


def composed(answer: Sequence[Mapping[str, Any]], reasoning: Reasoning.ValueType, *, field: str) -> str:
    """The source for the workers. `answer`: a grammar in llguidance's words that compiles, and those that it refers to
    by name.

    Raises Refusal naming the field.
    """
    grammars = list(answer)
    if start := _STARTS.get(reasoning):
        grammars = [{"lark_grammar": start + _REASONING}, {**answer[0], "name": "answer"}, *answer[1:]]
    source = json.dumps({"grammars": grammars})
    if (num_bytes := len(source.encode())) > MAX_GRAMMAR_BYTES:
        raise invalid(f"{field}: at most {MAX_GRAMMAR_BYTES} bytes are allowed, got {num_bytes}")
    return source


def schema_grammar(schema: Any, field: str) -> dict[str, Any]:
    """Of JSON that follows a schema, in llguidance's words. Raises Refusal naming the field."""
    grammar = {"json_schema": _with_little_space(schema, field)}
    _check(json.dumps({"grammars": [grammar]}), field)
    return grammar


def _check(source: str, field: str) -> None:
    from llguidance import LLMatcher, LLParserLimits

    _, problems = LLMatcher.validate_grammar_with_warnings(source, None, limits=LLParserLimits(verbose_errors=False))
    if problems:
        raise invalid(f"{field}: cannot be enforced: {problems[0].strip()}")


def _of_json_schema(text: str) -> dict[str, Any]:
    field = f"{_FIELD}.json_schema"
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise invalid(f"{field}: is not JSON: {err}") from err
    return {"json_schema": _with_little_space(schema, field)}


def _with_little_space(schema: Any, field: str) -> Any:
    """The client can set these options itself, in "x-guidance"."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise invalid(f"{field}: must be a JSON object, got {type(schema).__name__}")
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict):
        raise invalid(f"{field}.x-guidance: must be an object")
    if "whitespace_pattern" in options or options.get("whitespace_flexible") is False:
        return schema
    return {**schema, "x-guidance": {**options, "whitespace_pattern": _WHITESPACE}}


def _of_json_object(wanted: bool) -> dict[str, Any]:
    if not wanted:
        raise invalid(f"{_FIELD}.json_object: must be true, or be left out")
    return {"json_schema": _with_little_space({"type": "object"}, _FIELD)}


def _of_regex(regex: str) -> dict[str, Any]:
    from llguidance import regex_to_lark

    return {"lark_grammar": f"start: /{regex_to_lark(regex)}/"}


def _of_grammar(text: str) -> dict[str, Any]:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return {"lark_grammar": any_to_lark(text)}
    except Exception as err:  # what its parser raises is not documented
        raise invalid(f"{_FIELD}.grammar: is neither Lark nor GBNF: {err}") from err


def _of_choice(choice: Any) -> dict[str, Any]:
    texts = list(choice.texts)
    if not texts or not all(texts):
        raise invalid(f"{_FIELD}.choice: needs texts that are not empty")
    return {"lark_grammar": "start: " + " | ".join(map(json.dumps, texts))}


_ANSWERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "json_schema": _of_json_schema,
    "json_object": _of_json_object,
    "regex": _of_regex,
    "grammar": _of_grammar,
    "choice": _of_choice,
}
