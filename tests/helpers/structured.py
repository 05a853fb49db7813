"""Grammars for the demo pair's tokens, and whether outputs keep to them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
from tokenizers import Tokenizer

from echelon.pb.inference_pb2 import StructuredOutput
from echelon.pb.reading_pb2 import REASONING_UNSPECIFIED
from echelon.pb.sampling_pb2 import Grammar
from gateway.requests.grammar import grammar_of

EOS = 0  # of the demo pair
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def source_of(schema: dict[str, Any] = SCHEMA) -> str:
    return grammar_of(StructuredOutput(json_schema=json.dumps(schema)), REASONING_UNSPECIFIED)


def grammar(schema: dict[str, Any] = SCHEMA) -> Grammar:
    return Grammar(source=source_of(schema), eos_token_ids=[EOS])


def assert_valid(folder: Path, output: Sequence[int], schema: dict[str, Any] = SCHEMA) -> None:
    """`output`, up to the first EOS, is an object of the schema."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = tokenizer.decode(list(output[: output.index(EOS)]))
    jsonschema.validate(json.loads(text), schema)
