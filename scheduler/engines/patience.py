"""How long a round may take before it is late, and before its group counts as lost: learned from rounds like it."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Rounds stand for the time that rounds of that size take. The floors are for machines that others use too, where a
    round may stand still for a while, and for kernels that are compiled when they are first wanted."""

    late_rounds: float = 10.0
    min_late_s: float = 0.5
    lost_rounds: float = 20.0
    min_lost_s: float = 15.0
    forgotten: float = 0.01  # share of what a slow round has taught that a quicker one takes back; not measured


class Patience:
    """What rounds take at worst, by their size: of up to 1, 2, 4, 8 ... tokens. Pure."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()
        self._slowest_s: dict[int, float] = {}  # by the number of bits of the number of tokens

    def observe(self, num_tokens: int, wall_s: float) -> None:
        """A round has taken so long. One that stood still teaches little: twice what was known, at most."""
        size = num_tokens.bit_length()
        known = self._slowest_s.setdefault(size, wall_s)
        if wall_s < known:
            self._slowest_s[size] = known + self._tuning.forgotten * (wall_s - known)
        else:
            self._slowest_s[size] = min(wall_s, 2.0 * known)

    def late_s(self, num_tokens: int) -> float:
        """Seconds after which a round is late; inf while no round is known."""
        return max(self._tuning.min_late_s, self._tuning.late_rounds * self._expected_s(num_tokens))

    def lost_s(self, num_tokens: int) -> float:
        """Seconds after which no answer is to be expected; inf while no round is known."""
        return max(self._tuning.min_lost_s, self._tuning.lost_rounds * self._expected_s(num_tokens))

    def _expected_s(self, num_tokens: int) -> float:
        """At worst. Where no round of the size is known, a larger one takes time for each token."""
        size = num_tokens.bit_length()
        if size in self._slowest_s:
            return self._slowest_s[size]
        smaller = max((known for known in self._slowest_s if known <= size), default=None)
        if smaller is not None:
            return float(self._slowest_s[smaller] * 2 ** (size - smaller))
        return min(self._slowest_s.values(), default=inf)
