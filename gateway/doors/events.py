"""Events of a stream."""

from typing import NamedTuple


class NamedEvent(NamedTuple):
    name: str
    data: str


Event = str | NamedEvent  # a str is the data of one without a name
