"""How much of a round background seqs get beside others."""

from collections.abc import Iterable

from scheduler.target.state import TargetState

_PROMPT_KNEES = 4  # of background prompts alone in a round: they keep 4/5 of their speed, and newcomers wait less


class BackgroundShare:
    """Background seqs may slow rounds of others by `max_slowdown`, a share, on average.

    A round takes fixed + per_token * tokens, as measured (`RoundCost`), and the knee is fixed / per_token. So a round
    with n tokens of others takes max_slowdown longer with max_slowdown * (knee + n) tokens more. What is less than a
    token is saved for later rounds.
    """

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._saved = 0.0
        self._num_spent = 0

    def grant(self, num_tokens: int, knee: int) -> int:
        """Tokens of background seqs that may join a round of `num_tokens` tokens of others."""
        earned = self._max_slowdown * (knee + num_tokens)
        self._saved = min(self._saved + earned, 1.0 + earned)
        return int(self._saved)

    def spend(self, num_tokens: int) -> None:
        self._saved -= num_tokens
        self._num_spent += num_tokens

    def in_turns(self, states: list[TargetState]) -> Iterable[TargetState]:
        """So that each has its share, however few tokens are granted."""
        first = self._num_spent % len(states) if states else 0
        return states[first:] + states[:first]

    @staticmethod
    def prompt_budget(budget: int, knee: int) -> int:
        """Tokens of prompts in a round of background seqs alone."""
        return min(budget, _PROMPT_KNEES * knee)
