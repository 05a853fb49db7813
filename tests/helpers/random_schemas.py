"""Random JSON schemas with the features that JSONSchemaBench finds in the wild, whose values are short."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_NAMES = ("id", "name", "title", "items", "count", "state", "owner", "note", "url", "when", "größe", 'a"b')
_WORDS = ("new", "open", "done", "lost", "held", "naïve", "")
_PATTERNS = ("^[a-z]{2,8}$", r"^\d{4}-\d\d$", "^#[0-9a-f]{6}$", "^(yes|no)$")
_MOST_DEPTH = 2


def random_schema(rng: random.Random) -> Schema:
    """An object, sometimes with definitions that it refers to."""
    schema = _object(rng, 0)
    if rng.random() < 0.3:
        schema["$defs"] = {"shared": _object(rng, _MOST_DEPTH)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
        schema["required"] = [*schema["required"], "shared"]
    return schema | {"x-guidance": {"whitespace_flexible": False}}


def _value(rng: random.Random, depth: int) -> Schema:
    kinds = [*_LEAVES, *((_object, _array, _any_of) if depth <= _MOST_DEPTH else ())]
    return rng.choice(kinds)(rng, depth)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": names[: rng.randint(1, len(names))],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth + 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth + 1), {"type": "null"}]}


def _string(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _pattern(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _format(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])}


def _integer(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(-200, 200)
    return {"type": "integer", "minimum": least, "maximum": least + rng.choice([0, 9, 1000])}


def _number(rng: random.Random, depth: int) -> Schema:
    return {"type": "number", "minimum": 0, "exclusiveMaximum": rng.choice([1, 2.5, 100])}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": [*rng.sample(_WORDS, 3), rng.choice([None, 7, True])]}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["v1", 3, None, {"a": [1]}])}


def _types(rng: random.Random, depth: int) -> Schema:
    return {"type": ["boolean", "null"]}


_LEAVES: tuple[Callable[[random.Random, int], Schema], ...] = (
    _string,
    _pattern,
    _format,
    _integer,
    _number,
    _enum,
    _const,
    _types,
)
