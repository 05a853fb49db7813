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
    most_tokens: int = 128  # of rounds whose times are also kept size by size; not measured
    recent_share: float = 0.2  # weight of a round in the time of its size; not measured


_TUNING = Tuning()
_ROUNDING = 1e-9


class RoundCost:
    """Fits round time = fixed + per_token * tokens to the rounds seen; older ones count less.

    Small rounds do not follow a line: kernels compute tokens in tiles, so the first token of the next tile costs more
    than all others of it. Their times are also kept size by size.
    """

    def __init__(self, *, knee: float = _TUNING.first_knee) -> None:
        self.knee = int(knee)  # tokens that take as long as the fixed part of a round; a guess until sizes differed
        self._line = RecentLine(keep=_TUNING.keep)
        self._seconds_of: dict[int, float] = {}  # by the tokens of a round, recently

    def observe(self, num_tokens: int, run_ns: int) -> None:
        run_s = run_ns * 1e-9
        self._line.add(float(num_tokens), run_s)
        if (line := self._fit()) is not None:  # rounds that are much alike do not tell, and what they told before stays
            least, most = _TUNING.knees
            self.knee = max(least, min(most, int(line[0] / line[1])))
        if num_tokens <= _TUNING.most_tokens:
            before_s = self._seconds_of.get(num_tokens, run_s)
            self._seconds_of[num_tokens] = before_s + _TUNING.recent_share * (run_s - before_s)

    def slowdown(self, num_tokens: int, more: int) -> float:
        """How much longer a round of `num_tokens` takes with `more` tokens; 0.05: by 5 %."""
        by_line = more / (self.knee + num_tokens)
        return max([by_line, *(seen for size, seen in self._seen(num_tokens) if size <= num_tokens + more)])

    def room(self, num_tokens: int, slowdown: float) -> int:
        """How many tokens more slow a round of `num_tokens` by so much at most."""
        by_line = int(slowdown * (self.knee + num_tokens) + _ROUNDING)
        too_large = (size for size, seen in self._seen(num_tokens) if seen > slowdown + _ROUNDING)
        return min([by_line, *(size - num_tokens - 1 for size in too_large)])

    def _seen(self, num_tokens: int) -> list[tuple[int, float]]:
        """Larger rounds, and how much longer than one of `num_tokens` they took."""
        base_s = self._seconds_of.get(num_tokens)
        if not base_s:
            return []
        return [(size, run_s / base_s - 1.0) for size, run_s in self._seconds_of.items() if size > num_tokens]

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
