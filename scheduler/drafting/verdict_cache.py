"""Drafts for verdicts that have not come yet (speculative speculative decoding, arXiv 2603.03251).

While the target verifies the start of a seq's chain, the draft engine does two things. It continues the chain, which
pays if all of it is accepted. It also drafts for the likeliest other outcomes: the target stops at draft i and puts
there one of the tokens that the draft itself ranked next. Such a branch is a slot of its own; it shares the KV of the
tokens that it has in common with the chain. If the verdict is one of these outcomes, the branch replaces the chain, and
the target has drafts to verify at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.drafting.chain import Drafted, DraftSlot
from scheduler.drafting.state import DraftState
from scheduler.engines.slot import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Which outcomes get branches."""

    min_probability: float = 0.01  # no branch is drafted for outcomes that are less likely; not measured
    # How often the target's token is the draft's 2nd, 3rd or 4th choice if it is not the 1st; not measured.
    rank_odds: tuple[float, ...] = (0.4, 0.15, 0.08)
    prior_trials: float = 10.0  # weight of that guess; not measured
    decay: float = 0.99  # factor on what is known of the ranks, applied at each verdict; not measured


_TUNING = Tuning()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A verdict: the tokens before position `start` are accepted, and `token_id` replaces the draft at `start`."""

    start: int
    token_id: int
    probability: float


class Branch(NamedTuple):
    start: int
    token_id: int
    probability: float  # of the verdict, estimated when the branch was made
    slot: DraftSlot


class _RankOdds:
    """How often the target's token was the draft's second, third, ... choice when it was not the first."""

    def __init__(self, first_guess: Sequence[float]) -> None:
        self._hits = [_TUNING.prior_trials * odds for odds in first_guess]
        self._num_seen = _TUNING.prior_trials

    def __getitem__(self, rank: int) -> float:
        return self._hits[rank] / self._num_seen

    def __len__(self) -> int:
        return len(self._hits)

    def observe(self, rank: int | None) -> None:
        self._num_seen = _TUNING.decay * self._num_seen + 1.0
        self._hits = [_TUNING.decay * hits + (1.0 if i == rank else 0.0) for i, hits in enumerate(self._hits)]


class VerdictCache:
    """Which branches are worth drafting, and which are being drafted."""

    num_alternatives = 3  # runners-up that the draft engine reports per draft

    def __init__(self, max_branches: int) -> None:
        self._max_branches = max_branches  # per seq; 0: none
        self._branches: dict[DraftState, list[Branch]] = {}
        self._odds = _RankOdds(_TUNING.rank_odds)
        self.num_hits = 0
        self.num_misses = 0

    def branches(self, state: DraftState) -> Sequence[Branch]:
        return self._branches.get(state, ())

    def add(self, state: DraftState, branch: Branch) -> None:
        self._branches.setdefault(state, []).append(branch)

    def clear(self) -> None:
        """The draft engine is gone, and all branches with it."""
        self._branches.clear()

    def likeliest(self, state: DraftState) -> list[Outcome]:
        """Outcomes of the verification in flight that deserve a branch and have none, likeliest first."""
        slot = state.slot
        room = self._max_branches - len(self.branches(state))
        if slot is None or room <= 0 or not state.verifies_chain:
            return []
        taken = {(branch.start, branch.token_id) for branch in self.branches(state)}
        return [
            outcome
            for outcome in self._ranked(slot, state.target.num_verifying)[: self._max_branches]
            if (outcome.start, outcome.token_id) not in taken
        ][:room]

    def _ranked(self, slot: DraftSlot, num_verifying: int) -> list[Outcome]:
        rank_odds = [self._odds[rank] for rank in range(len(self._odds))]
        outcomes = []
        all_before = 1.0  # accepted
        for i, drafted in enumerate(slot.chain[: num_verifying + 1]):
            stops_here = all_before * (1.0 - drafted.odds)
            all_before *= drafted.odds
            for token_id, odd in zip(drafted.alternatives, rank_odds, strict=False):
                if stops_here * odd >= _TUNING.min_probability:
                    start, probability = slot.num_agreed + i, stops_here * odd
                    outcomes.append(Outcome(start=start, token_id=token_id, probability=probability))
        return sorted(outcomes, key=lambda outcome: -outcome.probability)

    def resolve(self, state: DraftState, contradicted: Drafted, start: int, token_id: int) -> DraftSlot | None:
        """The verdict puts `token_id` at position `start`, in place of a draft. Returns the branch that foresaw it."""
        if not self._max_branches:
            return None
        alternatives = contradicted.alternatives
        self._odds.observe(alternatives.index(token_id) if token_id in alternatives else None)
        for branch in self.branches(state):
            if (branch.start, branch.token_id) == (start, token_id):
                self.num_hits += 1
                self._branches[state].remove(branch)
                return branch.slot
        self.num_misses += 1
        return None

    def take(self, state: DraftState, slot: Slot) -> DraftSlot:
        """Forget the branch that has this slot. Returns the slot."""
        branch = next(branch for branch in self.branches(state) if branch.slot is slot)
        self._branches[state].remove(branch)
        return branch.slot

    def drop(self, state: DraftState, before: int | None = None) -> Iterable[DraftSlot]:
        """Forget the seq's branches, or those that start before a position. Returns their slots, to be released."""
        kept = [] if before is None else [branch for branch in self.branches(state) if branch.start >= before]
        dropped = [branch.slot for branch in self._branches.pop(state, ()) if branch not in kept]
        if kept:
            self._branches[state] = kept
        return dropped
