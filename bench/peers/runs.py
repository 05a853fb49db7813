"""What is asked of each side and what comes back. Standard library only: a peer's Python lacks our packages."""

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What a peer loads."""

    target: str
    draft: str | None  # None: it decodes plainly
    dtype: str
    threads: int
    max_num_seqs: int
    num_drafts: int  # per round


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Greedy requests of `num_tokens` each, whatever the model thinks of ending."""

    prompts: Sequence[Sequence[int]]
    concurrency: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One request. Times in seconds since it was sent."""

    token_ids: Sequence[int]
    first_token_s: float
    last_token_s: float
    num_rounds: int  # target rounds that gave it tokens

    @property
    def token_s(self) -> float:
        """Seconds per output token after the first."""
        return (self.last_token_s - self.first_token_s) / (len(self.token_ids) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The streams of a task, in the order of its prompts."""

    streams: Sequence[Stream]
    seconds: float  # from the first request to the last token


class OpenStream:
    """A request under way, sent now."""

    def __init__(self) -> None:
        self._sent = time.perf_counter()
        self._stamps: list[float] = []
        self._token_ids: list[int] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """Tokens of one round; nothing if it gave none."""
        if token_ids:
            self._stamps.append(time.perf_counter() - self._sent)
            self._token_ids += token_ids

    def close(self) -> Stream:
        return Stream(
            token_ids=self._token_ids,
            first_token_s=self._stamps[0],
            last_token_s=self._stamps[-1],
            num_rounds=len(self._stamps),
        )
