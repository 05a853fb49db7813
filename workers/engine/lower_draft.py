"""What drafts for a draft. The draft verifies its proposals by its own rule, so they change no draft and no output.

Whoever proposes decides alike on all ranks, because the ranks verify the same rows together.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from workers.engine.seq_state import SeqTable

MAX_PROPOSED: Final = 7  # in one forward: with its last token, a draft computes 8 rows, of which few cost little
MIN_RATE, MAX_RATE = 0.01, 0.95


@dataclass(frozen=True, slots=True)
class Proposal:
    token_ids: list[int]
    match_len: int = 0  # of a lookup: tokens of the suffix that they followed before


NOTHING: Final = Proposal([])


class Wanted(NamedTuple):
    """A chain that is about to grow."""

    slot: int
    most: int  # tokens that may be proposed for it


class LowerDraft(ABC):
    """The level beneath a draft."""

    def __init__(self) -> None:
        self.num_proposed = 0
        self.num_kept = 0

    def follow(self, table: SeqTable, slots: Sequence[int]) -> None:  # noqa: B027  # a lookup has nothing to do
        """The draft has computed a part of these seqs. They are distinct."""

    @abstractmethod
    def propose_all(self, table: SeqTable, wanted: Sequence[Wanted]) -> list[Proposal]:
        """What may follow the histories of these slots, which are distinct. May overwrite the tokens after them."""

    def observe(self, proposal: Proposal, num_kept: int) -> None:
        """The draft kept the first so many tokens of a proposal."""
        self.num_proposed += len(proposal.token_ids)
        self.num_kept += num_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """As shares of a step of the draft that computes one row."""

    lower_step: float  # of the level beneath
    row: float  # each further row of a step of the draft


class Pace:
    """How many tokens a level beneath should propose, so that the draft gets most tokens in a time.

    A round of g proposals, each kept with probability a, brings (1 - a^(g+1)) / (1 - a) tokens of the draft (arXiv
    2211.17192) and takes 1 + g (lower_step + row) of its steps. With g = 0, the draft is alone.
    """

    EXPLORE_EVERY: Final = 64  # rounds in which no proposal pays, one proposes a token nevertheless; not measured
    MEMORY: Final = 64.0  # proposals that count, about; not measured

    def __init__(self, costs: StepCosts) -> None:
        self._round_cost = costs.lower_step + costs.row
        self._num_kept, self._num_judged = 4.0, 5.0  # a prior of little weight
        self._num_resting = 0

    @property
    def is_resting(self) -> bool:
        return self._best() == 0

    def num_worth(self) -> int:
        """How many tokens to propose now."""
        best = self._best()
        if best:
            return best
        self._num_resting += 1
        return 1 if self._num_resting % self.EXPLORE_EVERY == 0 else 0

    def observe(self, num_kept: int, num_judged: int) -> None:
        """Of so many proposals that were compared, the first ones were kept."""
        share = max(0.0, 1.0 - num_judged / self.MEMORY)
        self._num_kept = share * self._num_kept + num_kept
        self._num_judged = share * self._num_judged + num_judged

    def _best(self) -> int:
        rate = min(MAX_RATE, max(MIN_RATE, self._num_kept / self._num_judged))

        def tokens_in_a_step(num_proposed: int) -> float:
            return (1 - rate ** (num_proposed + 1)) / (1 - rate) / (1 + num_proposed * self._round_cost)

        return max(range(MAX_PROPOSED + 1), key=tokens_in_a_step)
