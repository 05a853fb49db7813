"""JSON in pieces: lists that grow over many rounds are written as they grow, not all at once on the event loop."""

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

AT_ONCE = 256  # items, between two pauses


class Written(str):
    """JSON already."""

    __slots__ = ()


def to_json(value: Any) -> str:
    """The JSON of a value in which parts are Written."""
    if isinstance(value, Written):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    return json.dumps(value)


def as_list(items: Iterable[str]) -> Written:
    """A list of items that are JSON already."""
    return Written("[" + ",".join(items) + "]")


async def write_list(items: Sequence[T], write: Callable[[T], str]) -> Written:
    """A long list, with pauses in which others have their turn."""
    written: list[str] = []
    for start in range(0, len(items), AT_ONCE):
        written.append(",".join(map(write, items[start : start + AT_ONCE])))
        await asyncio.sleep(0)
    return as_list(written)
