"""The continuous pipeline: the draft runs while the target verifies, and only waiting for it costs time."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from scheduler.policy.acceptance import expected_tokens
from scheduler.policy.goodput import Row, SteadyState, pick_drafts, plan_serial, steady_state
from scheduler.policy.policy import PLAIN_ROW, Drafts, SpeculationPolicy, Tuning
from scheduler.policy.round_times import OverlappedTimes
from scheduler.policy.step_times import VerifyTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldTuning:
    """When the target waits for drafts. Together these values reach what the simulations of tests/unit/test_policy.py
    demand. None is measured."""

    max_fine: int = 8  # with more seqs, only even numbers of draft steps are considered: trying all takes too long
    max_held: int = 64  # with more seqs, the target never waits for a gain: they hardly ever all lack drafts
    steady_rows: int = 8  # n rows: the steady state is recomputed every 1 + n // steady_rows target rounds
    max_unverified: int = 4  # target rounds in a row without a verified draft, after which it waits for a draft step
    restart_steps: float = 0.5  # draft steps until a new chain begins: on average half a step is still running
    margin: float = 2.0  # a wait ends after this many times the expected time


class ContinuousPolicy(SpeculationPolicy):
    """`window`: most drafts ahead of the last commit; 0: the policy chooses. `has_branches`: the draft drafts for
    several verdicts, so it is never idle while the target verifies.

    If the draft should not run during target rounds (`times.runs_ahead` False), it drafts while the target waits.
    """

    times: OverlappedTimes

    def __init__(
        self,
        *,
        max_drafts: int,
        adaptive: bool,
        window: int = 0,
        has_branches: bool = False,
        tuning: Tuning | None = None,
        hold_tuning: HoldTuning | None = None,
    ) -> None:
        super().__init__(OverlappedTimes(), max_drafts=max_drafts, adaptive=adaptive, tuning=tuning)
        self._hold = hold_tuning or HoldTuning()
        self._window = window
        self._has_branches = has_branches
        self._num_unverified = 0  # consecutive target rounds without drafts
        self._steady: tuple[tuple[int, int], SteadyState] | None = None  # together with what it depends on

    # -- how long the target waits ------------------------------------------------------------------------------------

    def _hold_s(self, seqs: Sequence[Drafts], verify_s: VerifyTimes, num_other_tokens: int) -> float:
        if num_other_tokens or not all(seq.may_hold for seq in seqs):
            return 0.0
        return self._hold_for_fixed_s(seqs) or self._hold_for_gain_s(seqs, self._slowed(verify_s))

    def _hold_for_fixed_s(self, seqs: Sequence[Drafts]) -> float:
        """If a request fixed its number of drafts per round, the target waits for them if they are in flight. All seqs
        wait, as in the serial pipeline: a seq that is held alone misses the whole round of the others."""
        missing = max((seq.limit - seq.num_ready for seq in seqs if seq.is_fixed and seq.num_coming), default=0)
        if missing < 1:
            return 0.0
        step_s = self.times.draft_step_s(len(seqs)) if self.times.draft_is_known else self.times.target_s(1)
        return self._hold.margin * (missing + 1) * step_s

    def _hold_for_gain_s(self, seqs: Sequence[Drafts], verify_s: VerifyTimes) -> float:
        if not self._may_gain(seqs):
            return 0.0
        num_waited = self._best_wait(seqs, verify_s)
        if num_waited == 0 and self._is_overdue(seqs):
            num_waited = 1
        return self._hold.margin * (num_waited + 1) * self.times.draft_step_s(len(seqs)) if num_waited else 0.0

    def _may_gain(self, seqs: Sequence[Drafts]) -> bool:
        return (
            self.times.draft_is_known
            and all(seq.limit for seq in seqs)
            and any(seq.num_coming for seq in seqs)
            and len(seqs) <= self._hold.max_held
        )

    def _best_wait(self, seqs: Sequence[Drafts], verify_s: VerifyTimes) -> int:
        """The number of draft steps to wait for that gains most: tokens minus the price of the time."""
        steady = self._steady_state(seqs, len(seqs))
        runs_ahead = self.times.runs_ahead
        price = steady.rate if runs_ahead else self._price
        step_s = self.times.draft_step_s(len(seqs))
        waited_s = self.times.waited_step_s(len(seqs))
        restart_s = self._hold.restart_steps * step_s if runs_ahead else 0.0
        best_gain, best_wait = float("-inf"), 0
        most = max(seq.limit - seq.num_ready for seq in seqs)
        for num_waited in range(0, most + 1, 1 if len(seqs) <= self._hold.max_fine else 2):
            rows = [self._row_now(seq, num_waited if seq.num_coming else 0) for seq in seqs]
            counts, gain = pick_drafts(rows, verify_s, price)
            if runs_ahead:
                gain += self._value_of_going_on(rows, counts, steady, step_s)
            if num_waited:
                gain -= price * (num_waited * waited_s + restart_s)
            if gain > best_gain:
                best_gain, best_wait = gain, num_waited
        return best_wait

    def _is_overdue(self, seqs: Sequence[Drafts]) -> bool:
        """Whether to verify now: drafts that are never verified cannot show that they are worse than thought."""
        return self._num_unverified >= self._hold.max_unverified and not any(seq.num_ready for seq in seqs)

    def _value_of_going_on(
        self, rows: Sequence[Row], counts: Sequence[int], steady: SteadyState, step_s: float
    ) -> float:
        """The value in tokens of the drafts made meanwhile, if the verdict lets the chain continue."""
        wait_s = steady.num_waited * self.times.waited_step_s(len(rows))
        wait_s += self._hold.restart_steps * step_s if steady.num_waited else 0.0
        saved = steady.rate * wait_s / len(rows)
        value = 0.0
        for row, count in zip(rows, counts, strict=True):
            a = row.acceptance
            more = expected_tokens(a, steady.num_ready) - expected_tokens(a, steady.num_waited)
            more /= 1.0 - a ** (steady.num_ready + 1.0) + a ** (steady.num_waited + 1.0)
            value += a ** (count + 1.0) * (max(0.0, more) + saved)
        return value

    # -- what the target verifies -------------------------------------------------------------------------------------

    def _worth_verifying(self, seqs: Sequence[Drafts], verify_s: VerifyTimes) -> list[int]:
        counts = super()._worth_verifying(seqs, verify_s)
        self._num_unverified = 0 if any(counts) else self._num_unverified + 1
        return counts

    def _slowed(self, verify_s: VerifyTimes) -> VerifyTimes:
        return verify_s.slowed(self.times.slowdown) if self.times.runs_ahead else verify_s

    # -- what the draft writes ----------------------------------------------------------------------------------------

    def _lengths(self, seqs: Sequence[Drafts], rows: list[Row], num_rows: int) -> list[int]:
        steady = self._steady_state(seqs, num_rows)
        others = [PLAIN_ROW] * (num_rows - len(rows))
        verify_s = self._verify_times(rows, num_rows)
        waiting = plan_serial(rows + others, verify_s, self.times.waited_step_s)
        is_ahead = self._has_branches or steady.rate > waiting.rate
        rate = steady.rate if is_ahead else waiting.rate
        is_on = self._is_on(rate, waiting.plain_rate, len(rows), num_rows)
        self._price = rate if is_on else waiting.plain_rate
        self.times.runs_ahead = is_ahead and is_on
        if not is_on:
            return [row.num_fixed for row in rows]
        if not is_ahead:
            return waiting.lengths[: len(rows)]
        counts, _ = pick_drafts(rows, verify_s.slowed(self.times.slowdown), rate)
        return counts

    def _steady_state(self, seqs: Sequence[Drafts], num_rows: int) -> SteadyState:
        """Recomputed when it may have changed; for a big batch not in every round, because it takes longer there."""
        key = (num_rows, self._num_rounds // (1 + num_rows // self._hold.steady_rows))
        if self._steady is None or self._steady[0] != key:
            rows = [self._row(seq) for seq in seqs] + [PLAIN_ROW] * (num_rows - len(seqs))
            step_s = self.times.draft_step_s(len(seqs))
            verify_s = self._verify_times(rows, num_rows).slowed(self.times.slowdown)
            self._steady = (
                key,
                steady_state(
                    rows,
                    verify_s,
                    step_s,
                    waited_step_s=self.times.waited_step_s(len(seqs)),
                    restart_s=self._hold.restart_steps * step_s,
                ),
            )
        return self._steady[1]

    def _window_of(self, num_drafts: int, row: Row) -> int:
        """The drafts that are verified and, if the draft runs ahead, those that are drafted meanwhile."""
        if num_drafts == 0 or not self.times.runs_ahead:
            return num_drafts
        meanwhile = self._max_drafts
        if self.times.target_is_known and self.times.draft_is_known:
            meanwhile = ceil(self.times.target_s(1) / self.times.draft_step_s(1)) + 1
        return max(1, min(num_drafts + meanwhile, self._window or 2 * max(self._max_drafts, num_drafts)))
