"""How the time of a round follows from its tokens."""

from dataclasses import dataclass
from math import ceil, inf

from scheduler.policy.recent_line import RecentLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How times are learned."""

    first_knee: float = 64.0  # tokens that take as long as the fixed part of a round, until measured; not measured
    keep: float = 0.99  # weight that earlier observations keep; not measured
    least_rounds: float = 2.0  # weight of the rounds seen, below which the slope is not trusted; not measured
    least_variance: float = 64.0  # the same of the variance of their tokens; not measured
    knees: tuple[int, int] = (8, 1024)  # tokens: bounds of the knee, whatever was measured; not measured


_TUNING = Tuning()


class RoundCost:
    """Fits round time = fixed + per_token * tokens to the rounds seen; older ones count less."""

    def __init__(self, *, knee: float = _TUNING.first_knee) -> None:
        self._knee = knee
        self._line = RecentLine(keep=_TUNING.keep)

    def observe(self, num_tokens: int, run_ns: int) -> None:
        self._line.add(float(num_tokens), run_ns * 1e-9)

    @property
    def knee(self) -> int:
        """Tokens that take as long as the fixed part of a round; a guess until different sizes were seen."""
        line = self._fit()
        if line is None:
            return int(self._knee)
        fixed, per_token = line
        least, most = _TUNING.knees
        return max(least, min(most, int(fixed / per_token)))

    def seconds(self, num_tokens: int, budget: int) -> float:
        """To compute so many tokens in rounds of `budget` tokens; inf until rounds were seen."""
        if self._line.weight == 0.0:
            return inf if num_tokens else 0.0
        line = self._fit()
        if line is None:
            return self._line.mean_ratio * num_tokens
        fixed, per_token = line
        return fixed * ceil(num_tokens / budget) + per_token * num_tokens

    def _fit(self) -> tuple[float, float] | None:
        """The fixed time of a round and the time of a token, both above 0; None if they are not known."""
        line = self._line
        if line.weight < _TUNING.least_rounds or line.variance < _TUNING.least_variance:
            return None
        per_token = line.slope
        fixed = line.intercept(per_token)
        return (fixed, per_token) if per_token > 0.0 and fixed > 0.0 else None
