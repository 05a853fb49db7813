"""The probability that a draft is accepted, estimated from the probability that the draft model gave it."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How confidences are calibrated. Not measured."""

    # Borders between confidences that are counted separately.
    bounds: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.995)
    prior_trials: float = 8.0  # trials that the confidence itself, a fair guess (arXiv 2406.16858), counts for
    memory: float = 400.0  # trials of a bucket after which the first of them counts for a third


_TUNING = Tuning()


class Calibration:
    """Accepted drafts by confidence. A bucket's estimate starts at the mean of its confidences and moves to what the
    verdicts say; older verdicts count less."""

    def __init__(self) -> None:
        num_buckets = len(_TUNING.bounds) + 1
        self._num_accepted = [0.0] * num_buckets
        self._num_trials = [0.0] * num_buckets

    def observe(self, confidence: float, *, accepted: bool) -> None:
        """Count a draft that was compared, all before it having been accepted."""
        index = bisect_right(_TUNING.bounds, confidence)
        keep = 1.0 - 1.0 / _TUNING.memory
        self._num_accepted[index] = self._num_accepted[index] * keep + accepted
        self._num_trials[index] = self._num_trials[index] * keep + 1.0

    def rate(self, confidence: float, acceptance: float, usual: float) -> float:
        """The probability that a draft is accepted if all before it are.

        `acceptance`: of the drafts of this seq; `usual`: of all drafts. Each lies above 0 and below 1; they shift the
        odds.
        """
        index = bisect_right(_TUNING.bounds, confidence)
        accepted = self._num_accepted[index] + _TUNING.prior_trials * confidence
        rejected = self._num_trials[index] - self._num_accepted[index] + _TUNING.prior_trials * (1.0 - confidence)
        if rejected <= 0.0:
            return 1.0
        odds = accepted / rejected * (acceptance / (1.0 - acceptance)) * ((1.0 - usual) / usual)
        return odds / (1.0 + odds)
