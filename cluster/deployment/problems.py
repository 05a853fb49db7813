"""What pydantic finds wrong in a file, in our words, with the key that was probably meant."""

import difflib
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import Problem

# How alike a key must be to a known one to be suggested, by difflib (1: equal); other sections have many keys.
_ALIKE, _ALIKE_ELSEWHERE = 0.7, 0.85

# By pydantic's error types. If there is no remedy, the message says what the value must be.
_REMEDIES = {
    "int_type": "write a whole number, without quotes",
    "float_type": "write a number, without quotes",
    "bool_type": "write true or false, without quotes",
    "string_type": "write text, in quotes where it looks like something else",
    "string_unicode": "take out half a surrogate pair, like \\ud800",
    "list_type": "write a list, like [1, 2]",
}


def problems_of(error: ValidationError, schema: type[BaseModel]) -> list[Problem]:
    """Each of them; lines are not known yet. `schema`: of the whole file."""
    return [_problem(details, schema) for details in error.errors()]


def _problem(details: ErrorDetails, schema: type[BaseModel]) -> Problem:
    path = ".".join(str(part) for part in details["loc"]) or "file"
    kind, message, value = details["type"], details["msg"], details["input"]
    if kind == "extra_forbidden":
        remedy = _nearest(tuple(str(part) for part in details["loc"]), schema)
        return Problem(path=path, message="unknown key", remedy=remedy)
    if kind == "missing":
        return Problem(path=path, message="is missing", remedy="add it")
    if kind == "invalid_key":
        return Problem(path=path, message="a key must be text", remedy="put it in quotes, or take it out")
    if kind == "model_type":
        return Problem(path=path, message="must be a section of keys", remedy="fill it in or leave it out")
    if kind == "string_pattern_mismatch":
        message = "must be lower-case letters, digits and hyphens, at most 63"
    message = message.removeprefix("Value error, ").replace("Input should ", "must ")
    return Problem(path=path, message=message, remedy=_REMEDIES.get(kind, ""), value=repr(value))


def _nearest(path: tuple[str, ...], schema: type[BaseModel]) -> str:
    """The known key that an unknown one probably means: spelt alike, or the same word in another section."""
    *parents, key = path
    known = dict(_sections(schema))
    section = known.get(".".join(part for part in parents if not part.isdecimal()), schema)
    wanted = key.replace("-", "_").lower()
    by_lower = {name.lower(): name for name in section.model_fields}
    close = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=_ALIKE)
    if close:
        return f"did you mean {'.'.join([*parents, by_lower[close[0]]])}?"
    everywhere = [name for model in known.values() for name in model.model_fields]
    alike = difflib.get_close_matches(wanted, everywhere, n=1, cutoff=_ALIKE_ELSEWHERE)
    if alike:
        places = [f"{path}.{alike[0]}".lstrip(".") for path, model in known.items() if alike[0] in model.model_fields]
        return f"did you mean {' or '.join(places)}?"
    return f"known keys here: {', '.join(section.model_fields)}"


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections of a file; an item of a list has the path of the list."""
    yield path, model
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _sections(candidate, f"{path}.{name}".lstrip("."))
