"""Which runs a comparison consists of, and their order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.peers.results import Results, Side
from bench.peers.runs import Task

# Neighbours are what is compared most.
SIDES = (
    Side("Echelon", "plain"),
    Side("vLLM", "plain"),
    Side("transformers", "plain"),
    Side("Echelon", "policy"),
    Side("vLLM", "fixed"),
    Side("Echelon", "fixed"),
    Side("transformers", "fixed"),
)
WARM_UP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Turn:
    """Every side once, on the same prompts."""

    number: int
    load: int  # requests at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    systems: Sequence[str]
    loads: Sequence[int]
    num_turns: int  # of each load
    least_prompts: int  # of a run
    num_tokens: int
    pool: Sequence[list[int]]  # prompts; each turn has others, until the pool begins again

    def sides(self, turn: Turn) -> list[Side]:
        """In the order of the turn. `transformers` assists one request at a time."""
        sides = [s for s in SIDES if s.system in self.systems and (s != SIDES[-1] or turn.load == 1)]
        return sides[::-1] if turn.number % 2 else sides

    def missing(self, results: Results) -> Iterator[Turn]:
        """Every load has its first turn before one has its second."""
        for number in range(self.num_turns):
            for load in self.loads:
                turn = Turn(number, load)
                if not results.has(load, number, self.sides(turn)):
                    yield turn

    def task(self, turn: Turn) -> Task:
        return Task(prompts=self._prompts(turn.number, turn.load), concurrency=turn.load, num_tokens=self.num_tokens)

    def warm_up(self, turn: Turn) -> Task:
        """Fewer tokens of the next turn's prompts."""
        prompts = self._prompts(turn.number + 1, turn.load)[: turn.load]
        return Task(prompts=prompts, concurrency=turn.load, num_tokens=WARM_UP_TOKENS)

    def _prompts(self, number: int, load: int) -> list[list[int]]:
        count = max(load, self.least_prompts)
        return [self.pool[(number * count + i) % len(self.pool)] for i in range(count)]
