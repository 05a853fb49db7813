"""What `bench.speculate` measures: loads, runs, and what each run is compared with."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.variants import PLAIN, Variant


@dataclass(frozen=True, slots=True)
class Cell:
    """A load."""

    temperature: float
    concurrency: int

    @property
    def name(self) -> str:
        return f"temperature {self.temperature:g}, concurrency {self.concurrency}"


Prompts = Mapping[Cell, Sequence[list[int]]]  # token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All prompts once."""

    tokens_per_s: float
    token_s: float  # of a request, from its first token to its last: seconds per token, without prefill
    tokens_per_round: float  # of a request: accepted drafts and the target's own token
    acceptance: float  # accepted / compared drafts
    draft_idle: float  # share of the time in which the draft could have drafted and had no round
    target_idle: float  # share of the time in which the target had no round because it waited for drafts
    drafts_per_draft_round: float  # over all rows; a round of the continuous pipeline mostly has one step
    cache_hits: float  # share of the mismatches for which a branch was ready
    outputs: list[tuple[int, ...]]


@dataclass(slots=True)
class Results:
    """Everything measured so far."""

    runs: dict[Cell, dict[Variant, list[Run]]] = field(default_factory=dict)
    refusals: dict[Variant, str] = field(default_factory=dict)

    def add(self, variant: Variant, cell: Cell, run: Run) -> None:
        self.runs.setdefault(cell, {}).setdefault(variant, []).append(run)

    def ratios(self, cell: Cell, variant: Variant, base: Variant) -> list[float]:
        """Speed divided by that of another variant's run in the same turn, prefill included."""
        pairs = zip(self.runs[cell][variant], self.runs[cell][base], strict=False)
        return [run.tokens_per_s / other.tokens_per_s for run, other in pairs]

    def decoding_ratios(self, cell: Cell, variant: Variant, base: Variant) -> list[float]:
        """The same, from the first token of a request to its last."""
        pairs = zip(self.runs[cell][variant], self.runs[cell][base], strict=False)
        return [share(other.token_s, run.token_s) for run, other in pairs]

    def best_serial(self, cell: Cell, source: str) -> Variant | None:
        """The variant that the other pipelines of a source are compared with."""
        serial = [v for v in self.runs[cell] if (v.pipeline, v.source) == ("serial", source) and v.num_drafts]
        return max(serial, key=lambda v: _median_speed(self.runs[cell][v]), default=None)

    def best_without_policy(self, cell: Cell, variant: Variant) -> Variant:
        """The variant that the policy is compared with: no drafts, or the best fixed number."""
        fixed = [
            v for v in self.runs[cell] if (v.pipeline, v.source) == (variant.pipeline, variant.source) and v.num_drafts
        ]
        return max([PLAIN, *fixed], key=lambda v: _median_speed(self.runs[cell][v]))


def _median_speed(runs: Sequence[Run]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
