"""How much of a round background seqs get beside others."""

from collections.abc import Iterable

from scheduler.engines.round_cost import RoundCost
from scheduler.target.state import TargetState

_PROMPT_KNEES = 4  # of background prompts alone in a round: they keep 4/5 of their speed, and newcomers wait less


class BackgroundShare:
    """Background seqs may slow rounds of others by `max_slowdown`, a share, on average.

    What more tokens cost a round is measured (`RoundCost`). A round in which they are not worth it leaves its share to
    later ones.
    """

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._saved = 0.0  # of the time of a round
        self._num_spent = 0

    def grant(self, num_tokens: int, cost: RoundCost) -> int:
        """Tokens of background seqs that may join a round of `num_tokens` tokens of others."""
        most = cost.slowdown(num_tokens, 1) + self._max_slowdown
        self._saved = min(self._saved + self._max_slowdown, most)
        return cost.room(num_tokens, self._saved)

    def spend(self, num_tokens: int, more: int, cost: RoundCost) -> None:
        """So many `more` have joined it."""
        if more:
            self._saved -= cost.slowdown(num_tokens, more)
        self._num_spent += more

    def in_turns(self, states: list[TargetState]) -> Iterable[TargetState]:
        """So that each has its share, however few tokens are granted."""
        first = self._num_spent % len(states) if states else 0
        return states[first:] + states[:first]

    @staticmethod
    def prompt_budget(budget: int, knee: int) -> int:
        """Tokens of prompts in a round of background seqs alone."""
        return min(budget, _PROMPT_KNEES * knee)
