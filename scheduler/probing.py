"""When to speculate again after it did not pay. Plain state machines that count target rounds and their seconds."""

from scheduler.acceptance import AcceptancePrior

__all__ = ["Probes", "Switch"]

_ON = 1.01  # speculation must promise so much more than plain decoding to start ...
_OFF = 0.995  # ... and so little to end
_CLEARLY_OFF = 0.93  # below this it ends at once, above only if it stays so
_DWELL = 32  # target rounds

_FIRST_SHARE = 0.016  # of the time that probes may take
_LAST_SHARE = 0.002  # after many in vain
_MAX_PROBE_ROUNDS = 12  # target rounds after which a probe without a verdict counts as failed
_PROMISING = 0.5  # acceptance in a probe from which another one follows at once


class Switch:
    """Whether speculation pays: on or off, with hysteresis."""

    def __init__(self) -> None:
        self.is_on = True
        self._num_doubtful = 0  # target rounds in a row in which it did not pay

    def on_round(self) -> None:
        self._num_doubtful += 1

    def update(self, gain: float) -> bool:
        """`gain`: expected goodput with speculation by that without."""
        if not self.is_on:
            self.is_on = gain > _ON
            self._num_doubtful = 0
        elif gain >= _OFF:
            self._num_doubtful = 0
        elif gain < _CLEARLY_OFF or self._num_doubtful >= _DWELL:
            self.is_on = False
        return self.is_on


class Probes:
    """A few drafts now and then for a seq that has none, lest nobody notice that they would be accepted again.

    What a probe costs must have been saved up: a share of the time that passes, halved with every probe in vain.
    Probes that succeed follow one another, until the estimates say that speculation pays.
    """

    def __init__(self, prior: AcceptancePrior) -> None:
        self._prior = prior
        self._saved_s = 0.0
        self._share = _FIRST_SHARE
        self._num_rounds = 0  # of the probe that runs
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
        if num_trials and num_accepted >= _PROMISING * num_trials:
            self._share = _FIRST_SHARE
            self._begin()
        else:
            self._share = max(_LAST_SHARE, self._share / 2)

    def may_run(self, cost_s: float, *, is_busy: bool) -> bool:
        """Whether a probe that costs `cost_s` runs or may begin now. `is_busy`: none begins."""
        if self._begun_at is None and not is_busy and self._saved_s >= cost_s:
            self._saved_s = 0.0
            self._begin()
        return self._begun_at is not None

    def _begin(self) -> None:
        self._num_rounds = 0
        self._begun_at = (self._prior.num_accepted, self._prior.num_trials)
