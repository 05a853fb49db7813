"""Many streams at once, of all kinds, each compared with the same stream undisturbed: what runs while things die."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from echelon import AsyncClient
from echelon.errors import EchelonError, UnavailableError
from echelon.results import Completion

PROMPTS = ("def quicksort(items):\n", "import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self")
_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 200}
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0, "frequency_penalty": 0.8},
    {"temperature": 1.0, "n": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "ignore_eos": False, "structured_output": {"json_schema": _NUMBERS}},
)
RESUME_WITHIN_S = 120.0
_START_TIME = 18  # among the fields of /proc/PID/stat after the state
_STREAM_LIMIT_S = 180.0  # a stream that takes longer has failed
_LOGPROB_TOLERANCE = 1e-3  # other chunks of a prompt round differently
_REMEMBERED_S = 300.0  # longer than any loss is looked at
_TRY_AGAIN_S = 0.5  # after a refusal
_POLL_S = 0.02
_GONE_LIMIT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request."""

    prompt: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a client saw of its stream."""

    samples: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    logprobs: tuple[tuple[float, ...], ...] = ()  # of the chosen tokens; empty for samples that asked for none
    began_s: float = 0.0
    pause_s: float = 0.0  # the longest time between two chunks
    error: str = ""
    is_refused: bool = False  # UNAVAILABLE before anything came of it


@dataclass(slots=True, kw_only=True)
class Damage:
    """Of streams, compared with the undisturbed ones; in tokens, but for the last three."""

    compared: int = 0
    lost: int = 0
    repeated: int = 0  # more than there should be
    changed: int = 0
    logprobs: int = 0  # that differ or are missing though the tokens are right
    texts: int = 0  # streams whose text differs though their tokens do not
    failed: int = 0  # streams
    refused: int = 0  # requests: no damage if nobody could be there to take them
    error: str = ""  # of the last of them

    @property
    def is_any(self) -> bool:
        return bool(self.lost or self.repeated or self.changed or self.logprobs or self.texts or self.failed)

    def add(self, expected: Seen, got: Seen) -> None:
        if got.is_refused:
            self.refused, self.error = self.refused + 1, got.error
            return
        if got.error:
            self.failed, self.error = self.failed + 1, got.error
            return
        for wanted, tokens in zip(expected.samples, got.samples, strict=True):
            self.compared += len(wanted)
            self.lost += max(0, len(wanted) - len(tokens))
            self.repeated += max(0, len(tokens) - len(wanted))
            self.changed += sum(a != b for a, b in zip(wanted, tokens, strict=False))
        if expected.samples == got.samples:
            self.texts += expected.texts != got.texts
            self.logprobs += _differences(expected.logprobs, got.logprobs)


def _differences(expected: Sequence[Sequence[float]], got: Sequence[Sequence[float]]) -> int:
    return sum(
        abs(len(wanted) - len(values))
        + sum(abs(a - b) > _LOGPROB_TOLERANCE for a, b in zip(wanted, values, strict=False))
        for wanted, values in zip(expected, got, strict=True)
    )


def make_cases(number: int, num_tokens: int) -> list[Case]:
    """Requests of all kinds in turns, each with a seed of its own."""
    return [
        Case(
            prompt=PROMPTS[index % len(PROMPTS)],
            options={"ignore_eos": True, **_KINDS[index % len(_KINDS)], "seed": index, "max_tokens": num_tokens},
        )
        for index in range(number)
    ]


async def _no_pause() -> None:
    pass


class Crowd:
    """Clients that run one case each, again and again, and what came of it."""

    def __init__(self, address: str, cases: Sequence[Case]) -> None:
        self._address = address
        self.cases = cases
        self.expected: list[Seen] = []
        self._began_s: list[float] = []  # of the stream that each client reads now
        self._ended: list[tuple[int, Seen]] = []  # not yet taken; with the number of the case
        self._arrivals: deque[tuple[float, int]] = deque()  # when tokens came, and how many
        self.num_tokens = 0  # that have come so far

    async def observe(self) -> None:
        """Learn what the streams are when nothing happens. Raises EchelonError if one fails even then."""
        async with self._client() as client:
            self.expected = await asyncio.gather(*(self.read(client, case) for case in self.cases))
        for seen in self.expected:
            if seen.error:
                raise EchelonError("INTERNAL", seen.error)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Streams run inside; at the end they are cancelled."""
        self._began_s = [time.monotonic()] * len(self.cases)
        async with self._client() as client:
            tasks = [asyncio.create_task(self._repeat(client, number)) for number in range(len(self.cases))]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_for_tokens(self, number: int) -> None:
        """Until so many more have come."""
        wanted = self.num_tokens + number
        await until(lambda: self.num_tokens >= wanted)

    async def wait_until_ended(self, since_s: float) -> None:
        """Until every stream that ran at a moment has ended."""
        await until(lambda: all(began_s > since_s for began_s in self._began_s))

    def take_ended(self, damage: Damage) -> list[Seen]:
        """The streams that have ended since the last call, compared."""
        ended, self._ended = self._ended, []
        for number, seen in ended:
            damage.add(self.expected[number], seen)
        return [seen for _, seen in ended]

    def most_tokens(self) -> int:
        """Of one stream of each client."""
        return sum(case.options["max_tokens"] * case.options.get("n", 1) for case in self.cases)

    def rate(self, window_s: float) -> float:
        """Tokens a second that came within the last seconds."""
        since = time.monotonic() - window_s
        return sum(number for came_s, number in self._arrivals if came_s >= since) / window_s

    def silence(self, since_s: float) -> tuple[float, float]:
        """From when to when nothing came: the longest such time that ended after a moment."""
        times = [came_s for came_s, _ in self._arrivals]
        gaps = [(before, after) for before, after in pairwise(times) if after >= since_s]
        return max(gaps, key=lambda gap: gap[1] - gap[0], default=(since_s, since_s))

    def _client(self) -> AsyncClient:
        return AsyncClient(self._address, resume_within_s=RESUME_WITHIN_S)

    async def _repeat(self, client: AsyncClient, number: int) -> None:
        while True:
            self._began_s[number] = time.monotonic()
            seen = await self.read(client, self.cases[number])
            self._ended.append((number, seen))
            if seen.is_refused:
                await asyncio.sleep(_TRY_AGAIN_S)

    async def read(self, client: AsyncClient, case: Case, pause: Callable[[], Awaitable[None]] = _no_pause) -> Seen:
        """`pause`: between two chunks."""
        last_s = began_s = time.monotonic()
        pause_s, num_chunks = 0.0, 0
        try:
            async with client.stream(case.prompt, timeout_s=_STREAM_LIMIT_S, **case.options) as stream:
                async for chunk in stream:
                    now = time.monotonic()
                    last_s, pause_s = now, max(pause_s, now - last_s)
                    num_chunks += 1
                    self._note(now, len(chunk.token_ids))
                    await pause()
                return _seen(await stream.result(), began_s, pause_s)
        except EchelonError as err:
            is_refused = isinstance(err, UnavailableError) and num_chunks == 0
            return Seen(began_s=began_s, error=str(err), is_refused=is_refused)

    def _note(self, now: float, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._arrivals.append((now, num_tokens))
        while self._arrivals[0][0] < now - _REMEMBERED_S:
            self._arrivals.popleft()


def _seen(completion: Completion, began_s: float, pause_s: float) -> Seen:
    return Seen(
        samples=tuple(sample.token_ids for sample in completion.samples),
        texts=tuple(sample.text for sample in completion.samples),
        logprobs=tuple(tuple(position.chosen.logprob for position in sample.logprobs) for sample in completion.samples),
        began_s=began_s,
        pause_s=pause_s,
    )


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what changes is in other processes
        await asyncio.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Born:
    """A process, whichever other one gets its number later."""

    pid: int
    at: str  # in ticks since the system started; empty: it does not run

    @classmethod
    def with_pid(cls, pid: int) -> Self:
        try:
            state, *others = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return cls(pid, "")
        return cls(pid, "" if state == "Z" else others[_START_TIME])


def left(processes: set[Born]) -> set[Born]:
    """Those that still run some time after their deployment has ended."""
    deadline = time.monotonic() + _GONE_LIMIT_S
    while (running := {each for each in processes if each.at and each == Born.with_pid(each.pid)}) and (
        time.monotonic() < deadline
    ):
        time.sleep(_POLL_S)
    return running
