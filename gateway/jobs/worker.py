"""What is done with the lines of a job. The doors know how; this package only says when."""

from dataclasses import dataclass
from typing import Protocol

from gateway.jobs.records import Item, Job, Result
from gateway.requests.refusal import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLine:
    """A line of a job's input that is not empty."""

    item: Item
    problem: str = ""  # why it is no request; empty: it is one


class Worker(Protocol):
    async def find(self, job: Job, lines: bytes) -> list[FoundLine]:
        """Of whole lines; numbers and positions count from the first of them. Raises Refusal for reasons that pass."""

    async def run(self, job: Job, item: Item, line: bytes) -> Result:
        """Raises Refusal where it may succeed another time."""

    def failed(self, job: Job, item: Item, refusal: Refusal) -> Result:
        """The result of an item that was tried often enough."""
