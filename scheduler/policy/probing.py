"""When to speculate again after it did not pay. Plain state machines that count target rounds and seconds."""

from dataclasses import dataclass

from scheduler.policy.acceptance import AcceptancePrior


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """When speculation ends and is tried again. Together these values reach what the simulations of
    tests/unit/test_policy.py demand. None is measured."""

    start: float = 1.01  # goodput, relative to plain decoding, that speculation must exceed to start
    # It ends after goodput below the first number in as many target rounds as the second says: the worse, the sooner.
    end: tuple[tuple[float, int], ...] = ((0.995, 32), (0.95, 12), (0.8, 0))
    # Probes save up first_share of the target's time; half as much after each failed probe, down to last_share.
    first_share: float = 0.016
    last_share: float = 0.002
    max_probe_rounds: int = 12  # target rounds after which a probe without a verdict has failed
    promising: float = 0.5  # a probe with at least this acceptance, of which less was expected, is repeated at once


_TUNING = Tuning()


class Switch:
    """Whether speculation pays: on or off, with hysteresis."""

    def __init__(self) -> None:
        self.is_on = True
        self._num_below = [0] * len(_TUNING.end)  # target rounds in a row

    def on_round(self) -> None:
        self._num_below = [count + 1 for count in self._num_below]

    def on_gap(self) -> None:
        """The gain of this round is unknown, so counting low rounds starts again."""
        self._num_below = [0] * len(_TUNING.end)

    def update(self, gain: float) -> bool:
        """`gain`: expected goodput with speculation divided by that without."""
        if not self.is_on:
            self.is_on = gain > _TUNING.start
            self.on_gap()
            return self.is_on
        for index, (limit, num_rounds) in enumerate(_TUNING.end):
            if gain >= limit:
                self._num_below[index] = 0
            elif self._num_below[index] >= num_rounds:
                self.is_on = False
        return self.is_on


class Probes:
    """Gives a seq without drafts a few of them now and then, to notice when drafts would be accepted again.

    A probe may cost only what was saved up: a share of the time that passes, which halves after each failed probe.
    Probes that do better than the estimate follow one another until the estimate says that speculation pays.
    """

    def __init__(self, prior: AcceptancePrior) -> None:
        self._prior = prior
        self._saved_s = 0.0
        self._share = _TUNING.first_share
        self._num_rounds = 0  # of the current probe
        self._expected = 0.0  # acceptance by the estimate before the probe
        self._begun_at: tuple[int, int] | None = None  # (accepted, trials) of the prior; None: no probe runs

    def on_round(self, run_s: float) -> None:
        """A target round took `run_s`."""
        self._saved_s += self._share * run_s
        if self._begun_at is None:
            return
        self._num_rounds += 1
        num_accepted, num_trials = (
            self._prior.num_accepted - self._begun_at[0],
            self._prior.num_trials - self._begun_at[1],
        )
        if num_trials == 0 and self._num_rounds < _TUNING.max_probe_rounds:
            return
        self._begun_at = None
        if num_trials and num_accepted >= _TUNING.promising * num_trials and self._expected < _TUNING.promising:
            self._share = _TUNING.first_share
            self._begin(self._expected)
        else:
            self._share = max(_TUNING.last_share, self._share / 2)

    def may_run(self, cost_s: float, *, worth: float, expected: float, is_busy: bool) -> bool:
        """Whether a probe that costs `cost_s` runs or may begin now. `worth`: the possible gain, as the share (up to 1)
        of the savings that it may spend; `expected`: acceptance; `is_busy`: none begins."""
        if self._begun_at is None and not is_busy and self._saved_s * worth >= cost_s:
            self._saved_s = 0.0
            self._begin(expected)
        return self._begun_at is not None

    def _begin(self, expected: float) -> None:
        self._expected = expected
        self._num_rounds = 0
        self._begun_at = (self._prior.num_accepted, self._prior.num_trials)
