"""The probability that a draft is accepted: estimated from its seq's verdicts, starting from those of other seqs."""

from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How acceptance is estimated. Together these values reach what the simulations of tests/unit/test_policy.py
    demand. None is measured."""

    # What a trained draft of the same family reaches, until verdicts say otherwise.
    prior_mean: float = 0.7
    prior_trials: float = 2.0  # trials that this guess counts for: a handful of verdicts overrules it
    prior_memory: float = 400.0  # trials
    # Trials that the mean of all seqs counts for in a seq's estimate: texts differ by 0.1 or so.
    seq_prior_trials: float = 16.0
    changed_prior_trials: float = 3.0  # the same for a seq whose text has changed
    # Trials. Long memories are steady, short ones notice a change.
    memories: tuple[float, ...] = (300.0, 60.0, 12.0)
    # A shorter memory replaces the longer ones if it differs from the longest by more than change_sigmas standard
    # deviations, has at least min_trials trials and at most half of the longest one's.
    min_trials: float = 6.0
    change_sigmas: float = 3.5


_TUNING = Tuning()


def expected_tokens(acceptance: float, num_drafts: float) -> float:
    """The mean number of tokens that a verification of `num_drafts` drafts commits, the target's own token included.

    (1 - a^(k+1)) / (1 - a), arXiv 2406.14066. A fractional `num_drafts` interpolates.
    """
    if acceptance > 0.9999:
        return 1.0 + num_drafts
    return float((1.0 - acceptance ** (num_drafts + 1.0)) / (1.0 - acceptance))


@dataclass(slots=True)
class _Tally:
    """Share of accepted drafts among those that were compared; older ones count less."""

    memory: float  # trials
    num_accepted: float = 0.0
    num_trials: float = 0.0

    def add(self, num_accepted: float, num_trials: float) -> None:
        keep = max(0.0, 1.0 - num_trials / self.memory)
        self.num_accepted = self.num_accepted * keep + num_accepted
        self.num_trials = self.num_trials * keep + num_trials

    def contradicts(self, longer: "_Tally") -> bool:
        """Whether this memory strays from a longer one by more than chance explains."""
        if self.num_trials < _TUNING.min_trials or longer.num_trials < 2 * self.num_trials:
            return False
        before = longer.rate(0.5, 1.0)
        strayed = self.num_accepted / self.num_trials - before
        return strayed**2 > _TUNING.change_sigmas**2 * before * (1.0 - before) / self.num_trials

    def copy_from(self, other: "_Tally") -> None:
        self.num_accepted, self.num_trials = other.num_accepted, other.num_trials

    def rate(self, prior_mean: float, prior_trials: float) -> float:
        return (self.num_accepted + prior_mean * prior_trials) / (self.num_trials + prior_trials)


class AcceptancePrior:
    """What the verdicts of all seqs say about a seq that has none yet. One per scheduler and draft source."""

    def __init__(self) -> None:
        self._tally = _Tally(_TUNING.prior_memory)
        self.num_accepted = 0  # since the start
        self.num_trials = 0

    def observe(self, num_accepted: int, num_trials: int) -> None:
        self._tally.add(num_accepted, num_trials)
        self.num_accepted += num_accepted
        self.num_trials += num_trials

    @property
    def rate(self) -> float:
        return self._tally.rate(_TUNING.prior_mean, _TUNING.prior_trials)


@dataclass(slots=True)
class Acceptance:
    """The estimate for one seq and draft source.

    Drafts after the first rejected one were never compared. So a verdict of `a` accepted among `k` drafts is
    min(a + 1, k) trials with `a` successes. a / k would be biased, and more so for longer chains.
    """

    prior: AcceptancePrior
    _prior_trials: float = _TUNING.seq_prior_trials
    _tallies: list[_Tally] = field(default_factory=lambda: [_Tally(memory) for memory in _TUNING.memories])

    @classmethod
    def start(cls, prior: AcceptancePrior) -> Self:
        return cls(prior)

    def observe(self, num_accepted: int, num_verified: int) -> None:
        """A verdict: `num_accepted` of `num_verified` drafts were accepted."""
        if num_verified == 0:
            return
        num_trials = min(num_accepted + 1, num_verified)
        self.prior.observe(num_accepted, num_trials)
        for tally in self._tallies:
            tally.add(num_accepted, num_trials)
        for index in range(len(self._tallies) - 1, 0, -1):
            if self._tallies[index].contradicts(self._tallies[0]):
                self._forget_before(index)

    def _forget_before(self, index: int) -> None:
        """The text has changed: make the longer memories forget what this one does not know."""
        for longer in self._tallies[:index]:
            longer.copy_from(self._tallies[index])
        self._prior_trials = _TUNING.changed_prior_trials

    @property
    def rate(self) -> float:
        """The probability that a draft is accepted if all before it are, 0 < rate < 1."""
        return self._tallies[0].rate(self.prior.rate, self._prior_trials)
