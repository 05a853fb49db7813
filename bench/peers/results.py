"""What `bench.peers` measured: runs by load, turn and side, and what is compared with what."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.peers.runs import Run, Stream

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Side:
    """A system in one of its modes."""

    system: str
    mode: str  # plain; fixed: the same number of drafts every round; policy: Echelon chooses

    @property
    def name(self) -> str:
        return f"{self.system}, {self.mode}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of a side. Runs of the same load and turn have the same prompts and followed one another."""

    load: int  # requests at once
    turn: int
    side: Side
    run: Run
    other_cores: float | None  # kept busy by other processes meanwhile; None: not known


Metric = Callable[[Run], float]


def tokens_per_s(run: Run) -> float:
    return sum(len(stream.token_ids) for stream in run.streams) / run.seconds


def first_token_s(run: Run) -> float:
    return statistics.median(stream.first_token_s for stream in run.streams)


def token_s(run: Run) -> float:
    return statistics.median(stream.token_s for stream in run.streams)


def tokens_per_round(run: Run) -> float:
    return sum(len(s.token_ids) for s in run.streams) / sum(s.num_rounds for s in run.streams)


class Results:
    """The newest measurement of each side in each turn of each load."""

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        self._by_key: dict[tuple[int, int, Side], Measurement] = {}
        for measurement in measurements:
            self.add(measurement)

    def add(self, measurement: Measurement) -> None:
        self._by_key[measurement.load, measurement.turn, measurement.side] = measurement

    def has(self, load: int, turn: int, sides: Iterable[Side]) -> bool:
        return all((load, turn, side) in self._by_key for side in sides)

    def quiet(self, most_cores: float | None) -> "Results":
        """Only turns in which other processes never used more than that; None: all."""
        limit = math.inf if most_cores is None else most_cores
        busy = {(m.load, m.turn) for m in self._by_key.values() if (m.other_cores or 0.0) > limit}
        return Results(m for m in self._by_key.values() if (m.load, m.turn) not in busy)

    @property
    def num_turns(self) -> int:
        """Over all loads."""
        return len({(m.load, m.turn) for m in self._by_key.values()})

    @property
    def systems(self) -> set[str]:
        return {m.side.system for m in self._by_key.values()}

    @property
    def loads(self) -> list[int]:
        return sorted({m.load for m in self._by_key.values()})

    def sides(self, load: int) -> list[Side]:
        found = {m.side for m in self._by_key.values() if m.load == load}
        return sorted(found, key=lambda side: (side.system, side.mode))

    def measurements(self, load: int, side: Side) -> list[Measurement]:
        """In the order of turns."""
        found = (m for m in self._by_key.values() if (m.load, m.side) == (load, side))
        return sorted(found, key=lambda m: m.turn)

    def values(self, load: int, side: Side, metric: Metric) -> list[float]:
        return [metric(m.run) for m in self.measurements(load, side)]

    def best(self, load: int, system: str) -> Side:
        """The fastest mode of a system."""
        modes = [side for side in self.sides(load) if side.system == system]
        return max(modes, key=lambda side: statistics.median(self.values(load, side, tokens_per_s)))

    def ratios(self, load: int, side: Side, base: Side, metric: Metric) -> list[float]:
        """Of the turns that have both."""
        return [metric(m.run) / metric(other.run) for m, other in self._pairs(load, side, base)]

    def equal_share(self, load: int, side: Side, base: Side) -> float | None:
        """Share of streams whose tokens are those of the base; None without any to compare."""
        equal = [
            _same(stream, other)
            for m, partner in self._pairs(load, side, base)
            for stream, other in zip(m.run.streams, partner.run.streams, strict=True)
        ]
        return statistics.fmean(equal) if equal else None

    def _pairs(self, load: int, side: Side, base: Side) -> list[tuple[Measurement, Measurement]]:
        others = {m.turn: m for m in self.measurements(load, base)}
        return [(m, others[m.turn]) for m in self.measurements(load, side) if m.turn in others]


def _same(stream: Stream, other: Stream) -> bool:
    return list(stream.token_ids) == list(other.token_ids)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the true median with 95 % confidence or more, whatever the distribution: two of the values
    in sorted order, chosen by the binomial distribution. None for fewer than 6 values, which allow none."""
    n = len(values)
    tails = [2 * sum(math.comb(n, i) for i in range(rank + 1)) / 2**n for rank in range(n // 2)]
    ranks = [rank for rank, tail in enumerate(tails) if tail <= 1 - CONFIDENCE]
    if not ranks:
        return None
    ordered = sorted(values)
    return ordered[ranks[-1]], ordered[-1 - ranks[-1]]
