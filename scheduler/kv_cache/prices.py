"""How long it takes to bring blocks back, from the fetches seen."""

from dataclasses import dataclass

from scheduler.policy.recent_line import RecentLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    keep: float = 0.9  # weight that earlier fetches keep when a new one is seen; not measured
    least_variance: float = 4.0  # of the numbers of blocks, below which the slope is not trusted; not measured
    keep_on_refusal: float = 0.9  # factor on a price that was found too high, so that it is tried again; not measured


_TUNING = Tuning()


class FetchTimes:
    """Seconds to fetch n blocks from one tier: a fixed part and one for each block. Unknown times count as zero, so the
    first fetch is always tried."""

    def __init__(self) -> None:
        self._line = RecentLine(keep=_TUNING.keep)
        self._trust = 1.0

    def observe(self, num_blocks: int, seconds: float) -> None:
        self._line.add(float(num_blocks), seconds)
        self._trust = 1.0

    def seconds(self, num_blocks: int) -> float:
        line = self._line
        if num_blocks == 0 or line.weight == 0.0:
            return 0.0
        slope = line.slope if line.variance >= _TUNING.least_variance else 0.0
        fixed = line.intercept(slope)
        if slope <= 0.0 or fixed < 0.0:  # too few sizes seen: all of the time is in proportion
            return self._trust * line.mean_ratio * num_blocks
        return self._trust * (fixed + slope * num_blocks)

    def refused(self) -> None:
        """The price was too high to fetch, so it will not be measured."""
        self._trust *= _TUNING.keep_on_refusal
