"""How long a round may take before it is late, and before its group counts as lost, learned from similar rounds."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Limits are multiples of the time that rounds of that size take. The floors allow for machines that others use
    too, where a round may stall for a while, and for kernels that are compiled on first use."""

    late_rounds: float = 10.0  # times the time of a round, after which it is late; not measured
    min_late_s: float = 0.5  # a round that takes less is not late; not measured
    lost_rounds: float = 20.0  # times the time of a round, after which its group is lost; not measured
    min_lost_s: float = 15.0  # after less, no group is lost; not measured
    most_growth: float = 2.0  # a slow round raises what is known by at most this factor; not measured
    forgotten: float = 0.01  # share of what a slow round taught that a faster one takes back; not measured


class Patience:
    """The worst time of rounds by size: up to 1, 2, 4, 8 ... tokens. Pure."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()
        self._slowest_s: dict[int, float] = {}  # by the number of bits of the number of tokens

    def observe(self, num_tokens: int, wall_s: float) -> None:
        """A round took this long. One that stalled teaches little."""
        size = num_tokens.bit_length()
        known = self._slowest_s.setdefault(size, wall_s)
        if wall_s < known:
            self._slowest_s[size] = known + self._tuning.forgotten * (wall_s - known)
        else:
            self._slowest_s[size] = min(wall_s, self._tuning.most_growth * known)

    def late_s(self, num_tokens: int) -> float:
        """Seconds after which a round is late; inf while no round is known."""
        return max(self._tuning.min_late_s, self._tuning.late_rounds * self._expected_s(num_tokens))

    def lost_s(self, num_tokens: int) -> float:
        """Seconds after which no answer is expected any longer; inf while no round is known."""
        return max(self._tuning.min_lost_s, self._tuning.lost_rounds * self._expected_s(num_tokens))

    def _expected_s(self, num_tokens: int) -> float:
        """The worst time. If no round of the size is known, a smaller one is scaled up, or a larger one is used."""
        size = num_tokens.bit_length()
        if size in self._slowest_s:
            return self._slowest_s[size]
        smaller = max((known for known in self._slowest_s if known <= size), default=None)
        if smaller is not None:
            return float(self._slowest_s[smaller] * 2 ** (size - smaller))
        return min(self._slowest_s.values(), default=inf)
