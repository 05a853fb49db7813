"""How long it takes to bring blocks back, from the fetches seen."""

from dataclasses import dataclass
from math import sqrt

from scheduler.policy.recent_line import RecentLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How times are learned."""

    keep: float = 0.9  # weight that earlier fetches keep when a new one is seen; not measured
    least_variance: float = 4.0  # of the numbers of blocks, below which the slope is not trusted; not measured
    # After so many refusals a fetch is tried again, whatever its price. Times may have changed; and if not, fewer than
    # one hit in 20 is slow, also where host memory and disk are both tried.
    refusals: int = 64
    change: float = 0.5  # a trial in less than this share of the expected time: what was seen before counts no more
    deviations: float = 2.0  # by which a price is raised: about one fetch in 20 takes longer


_TUNING = Tuning()


class FetchTimes:
    """Seconds to fetch n blocks from one tier: a fixed part and one for each block, and more if fetches often take
    longer than that. Unknown times count as zero, so the first fetch is always tried."""

    def __init__(self) -> None:
        self._line = RecentLine(keep=_TUNING.keep)
        self._num_refusals = 0
        self._square_of_excess = 0.0  # mean of the relative ones

    def observe(self, num_blocks: int, seconds: float) -> None:
        expected_s = self._expected_s(num_blocks)
        if self._is_trial and seconds < _TUNING.change * expected_s:
            self._line, self._square_of_excess, expected_s = RecentLine(keep=_TUNING.keep), 0.0, 0.0
        if expected_s > 0.0:
            excess = max(0.0, seconds / expected_s - 1.0)
            self._square_of_excess += (1.0 - _TUNING.keep) * (excess**2 - self._square_of_excess)
        self._line.add(float(num_blocks), seconds)
        self._num_refusals = 0

    def seconds(self, num_blocks: int) -> float:
        if self._is_trial:
            return 0.0
        return self._expected_s(num_blocks) * (1.0 + _TUNING.deviations * sqrt(self._square_of_excess))

    @property
    def _is_trial(self) -> bool:
        return self._num_refusals >= _TUNING.refusals

    def _expected_s(self, num_blocks: int) -> float:
        line = self._line
        if num_blocks == 0 or line.weight == 0.0:
            return 0.0
        slope = line.slope if line.variance >= _TUNING.least_variance else 0.0
        fixed = line.intercept(slope)
        if slope <= 0.0 or fixed < 0.0:  # too few sizes seen: all of the time is in proportion
            return line.mean_ratio * num_blocks
        return fixed + slope * num_blocks

    def refused(self) -> None:
        """The price was too high to fetch, so it will not be measured."""
        self._num_refusals += 1
