"""When to speculate again after it did not pay. Plain state machines that count target rounds and their seconds."""

from scheduler.policy.acceptance import AcceptancePrior

__all__ = ["Probes", "Switch"]

_ON = 1.01  # speculation must promise so much more than plain decoding to start ...
# ... and promise so little, for so many target rounds in a row, to end: the worse, the sooner.
_OFF = ((0.995, 32), (0.95, 12), (0.8, 0))

_FIRST_SHARE = 0.016  # of the time that probes may take
_LAST_SHARE = 0.002  # after many in vain
_MAX_PROBE_ROUNDS = 12  # target rounds after which a probe without a verdict counts as failed
_PROMISING = 0.5  # acceptance in a probe from which another one follows at once, if less was expected


class Switch:
    """Whether speculation pays: on or off, with hysteresis."""

    def __init__(self) -> None:
        self.is_on = True
        self._num_below = [0] * len(_OFF)  # target rounds in a row

    def on_round(self) -> None:
        self._num_below = [count + 1 for count in self._num_below]

    def on_gap(self) -> None:
        """This round the gain is not known: whether it was low for long is to be seen anew."""
        self._num_below = [0] * len(_OFF)

    def update(self, gain: float) -> bool:
        """`gain`: expected goodput with speculation by that without."""
        if not self.is_on:
            self.is_on = gain > _ON
            self.on_gap()
            return self.is_on
        for index, (limit, num_rounds) in enumerate(_OFF):
            if gain >= limit:
                self._num_below[index] = 0
            elif self._num_below[index] >= num_rounds:
                self.is_on = False
        return self.is_on


class Probes:
    """A few drafts now and then for a seq that has none, lest nobody notice that they would be accepted again.

    What a probe costs must have been saved up: a share of the time that passes, halved with every probe in vain.
    Probes that succeed against the estimate follow one another, until that says that speculation pays.
    """

    def __init__(self, prior: AcceptancePrior) -> None:
        self._prior = prior
        self._saved_s = 0.0
        self._share = _FIRST_SHARE
        self._num_rounds = 0  # of the probe that runs
        self._expected = 0.0  # acceptance, by the estimate before it
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
        if num_trials == 0 and self._num_rounds < _MAX_PROBE_ROUNDS:
            return
        self._begun_at = None
        if num_trials and num_accepted >= _PROMISING * num_trials and self._expected < _PROMISING:
            self._share = _FIRST_SHARE
            self._begin(self._expected)
        else:
            self._share = max(_LAST_SHARE, self._share / 2)

    def may_run(self, cost_s: float, *, worth: float, expected: float, is_busy: bool) -> bool:
        """Whether a probe that costs `cost_s` runs or may begin now. `worth`: what there is to be won, up to 1: the
        share of what was saved up that it is worth; `expected`: acceptance; `is_busy`: none begins."""
        if self._begun_at is None and not is_busy and self._saved_s * worth >= cost_s:
            self._saved_s = 0.0
            self._begin(expected)
        return self._begun_at is not None

    def _begin(self, expected: float) -> None:
        self._expected = expected
        self._num_rounds = 0
        self._begun_at = (self._prior.num_accepted, self._prior.num_trials)
