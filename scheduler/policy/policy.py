"""How many drafts each seq gets, and when the target waits for them, so that tokens a second are most.

A pure class. It is told how long rounds took and decides by what it has learned. Acceptance comes from the verdicts
of each seq (`acceptance.py`), times from the rounds (`round_times.py`), and the best numbers from both (`goodput.py`).
A seq whose drafts do not pay is probed now and then (`probing.py`). This file holds what both pipelines share. What
they plan and how long they wait is in `serial.py` and `continuous.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isinf
from typing import NamedTuple

from scheduler.policy.acceptance import AcceptancePrior, expected_tokens
from scheduler.policy.goodput import Row, pick_drafts, rate_of_alike
from scheduler.policy.probing import Probes, Switch
from scheduler.policy.round_times import RoundTimes
from scheduler.policy.step_times import VerifyTimes

PLAIN_ROW = Row(0.0, 0)  # a seq that decodes without drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Settings of both pipelines. Together they reach what the simulations of tests/unit/test_policy.py demand. None is
    measured."""

    # Until the times are known, each seq gets num_unmeasured drafts, or 1 if more than max_unmeasured seqs draft.
    num_unmeasured: int = 4  # also the most drafts of a probe
    max_unmeasured: int = 8
    explore_every: int = 48  # target rounds; one of them tries what it would not choose, unless requests wait
    num_timed: float = 4.0  # plain rounds of a size to time: the first one at once, the others in exploring rounds
    rest_rounds: int = 8  # target rounds in which no drafts are expected, after the policy ordered none
    decent_acceptance: float = 0.7  # catching up is judged by the acceptance of all seqs, but at least by this
    min_survival: float = 0.05  # a chain ends where its next draft is less likely than this to be accepted
    probe_share: float = 0.25  # of a target step: the time of a probe's drafts, unless already one draft takes longer
    # A probe may spend a share of its savings: what drafts of acceptance never_wrong would add to the tokens per second
    # (0.5 is half as many again), divided by hoped_gain. It is at least least_worth, since times change, and at most 1.
    hoped_gain: float = 0.5
    least_worth: float = 0.05
    never_wrong: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """One decoding seq, at the moment when the target is free for it."""

    acceptance: float  # estimated probability that a draft is accepted (Acceptance.rate)
    num_ready: int  # drafts available
    num_coming: int  # further drafts that rounds in flight will bring
    limit: int  # most drafts that it may verify (by request and room); 0: it decodes plainly
    is_fixed: bool = False  # the request asked for exactly `limit` drafts per round, so the policy does not choose
    num_behind: int = 0  # tokens of its history that the draft engine would first have to catch up with
    may_hold: bool = True  # False: it was held, and its time is over


class Choice(NamedTuple):
    num_verify: int  # drafts to verify now; 0: plain decoding
    hold_s: float = 0.0  # > 0: wait for more drafts instead of decoding now, for at most this long


class SpeculationPolicy(ABC):
    """One per scheduler: `SerialPolicy` or `ContinuousPolicy`.

    `adaptive` False: every seq drafts and verifies as much as its limit allows. The policy then only chooses whether a
    continuous pipeline waits for drafts.
    """

    def __init__(self, times: RoundTimes, *, max_drafts: int, adaptive: bool, tuning: Tuning | None = None) -> None:
        self.prior = AcceptancePrior()  # of the draft model's drafts
        self.times = times
        self._tuning = tuning or Tuning()
        self._max_drafts = max_drafts
        self._adaptive = adaptive
        self._switch = Switch()
        self._probes = Probes(self.prior)
        self._num_rounds = 0
        self._num_rows = 0  # of the last target round that decoded
        self._has_ordered = False  # whether it ordered drafts when last asked for lengths
        self._rests_until = 0  # target round
        self._step_cost: float | None = None  # None: to be recomputed
        self._num_waiting = 0
        self._price = 0.0  # expected tokens per second, as last computed; 0: unknown
        self._saving: tuple[tuple[int, int], float] | None = None  # together with what it depends on

    # -- what the pipelines differ in -------------------------------------------------------------------------------

    @abstractmethod
    def _hold_s(self, seqs: Sequence[Drafts], verify_s: VerifyTimes, num_other_tokens: int) -> float:
        """How long the target should wait for drafts. It waits for all seqs or none, so that no seq misses a round."""

    @abstractmethod
    def _lengths(self, seqs: Sequence[Drafts], rows: list[Row], num_rows: int) -> list[int]:
        """Drafts to verify for each of these rows, of `num_rows` that decode, when drafts may pay."""

    @abstractmethod
    def _window_of(self, num_drafts: int, row: Row) -> int:
        """How far a chain may run ahead so that `num_drafts` are at hand when the target is free."""

    # -- what happened ------------------------------------------------------------------------------------------------

    def observe_target(self, *, num_seqs: int, num_tokens: int, num_context: int, run_s: float) -> None:
        """A target round over `num_tokens` tokens of `num_seqs` seqs took `run_s`. `num_context`: tokens in their KV
        caches."""
        self._num_rounds += 1
        self._step_cost = None
        self._switch.on_round()
        self._probes.on_round(run_s)
        self.times.observe_target(num_tokens, num_context, run_s)

    def observe_draft(
        self, *, num_seqs: int, num_steps: int, num_chunk_tokens: int, run_s: float, beside_target: bool = False
    ) -> None:
        """A draft round took `run_s`; see RoundTimes."""
        self._step_cost = None
        self.times.observe_draft(
            num_seqs=num_seqs,
            num_steps=num_steps,
            num_chunk_tokens=num_chunk_tokens,
            run_s=run_s,
            beside_target=beside_target,
        )

    # -- what the target verifies -------------------------------------------------------------------------------------

    def choose(self, seqs: Sequence[Drafts], *, num_other_tokens: int, num_waiting: int) -> list[Choice]:
        """Plan a target round of these seqs, all that decode: what each verifies, or how long it is held.

        `num_other_tokens`: prompt tokens in that round. `num_waiting`: requests that wait for their first round.
        """
        self._num_waiting = num_waiting
        if 2 * len(seqs) < self._num_rows:
            self._rests_until = 0  # drafts may pay again
        self._num_rows = len(seqs)
        if not any(seq.num_ready or seq.num_coming for seq in seqs):
            return [Choice(0) for _ in seqs]
        if not self.times.target_is_known:
            return [Choice(min(seq.num_ready, seq.limit)) for seq in seqs]
        num_fixed = sum(seq.limit for seq in seqs if seq.is_fixed or not self._adaptive)
        verify_s = self.times.verify_times(len(seqs), num_other_tokens=num_other_tokens, num_fixed=num_fixed)
        hold_s = self._hold_s(seqs, verify_s, num_other_tokens)
        if hold_s > 0.0:
            return [Choice(0, hold_s)] * len(seqs)
        counts = self._worth_verifying(seqs, verify_s)
        return [Choice(count) for count in counts]

    def _worth_verifying(self, seqs: Sequence[Drafts], verify_s: VerifyTimes) -> list[int]:
        rows = [self._row_now(seq) for seq in seqs]
        counts, _ = pick_drafts(rows, verify_s, self._price or self._price_of(rows, verify_s))
        if self._verifies_any:
            # Drafts that are never verified cannot show that they are better than thought.
            counts = [max(count, min(1, row.most)) for count, row in zip(counts, rows, strict=True)]
        return counts

    @property
    def _verifies_any(self) -> bool:
        """At least one draft for each seq, whatever it seems worth."""
        return self._is_exploring

    def _price_of(self, rows: Sequence[Row], verify_s: VerifyTimes) -> float:
        """Tokens per second with all available drafts or with none, whichever is more, if above all that was seen."""
        all_s = verify_s(sum(row.most for row in rows))
        if isinf(all_s):
            return sum(row.fixed_tokens for row in rows) / verify_s(sum(row.num_fixed for row in rows))
        return sum(expected_tokens(row.acceptance, row.most) for row in rows) / all_s

    def _row_now(self, seq: Drafts, num_more: int = 0) -> Row:
        num_ready = min(seq.num_ready + num_more, seq.limit)
        if seq.is_fixed or not self._adaptive:
            return Row(seq.acceptance, 0, num_ready)
        return Row(seq.acceptance, min(num_ready, self._max_drafts))

    # -- what the draft writes ----------------------------------------------------------------------------------------

    def draft_lengths(self, seqs: Sequence[Drafts]) -> list[int]:
        """For each seq. Serial: drafts to order before the next target round. Continuous: how many drafts ahead of the
        last commit its chain may run. 0: the draft does nothing for it.
        """
        self._step_cost = None
        rows = [self._row(seq) for seq in seqs]
        if not any(row.limit for row in rows):
            return [self._window_of(row.num_fixed, row) for row in rows]
        if not self.times.is_measured:
            most = self._tuning.num_unmeasured if len(rows) <= self._tuning.max_unmeasured else 1
            return [self._window_of(row.num_fixed or min(row.limit, most), row) for row in rows]
        num_rows = max(len(seqs), self._num_rows)
        times_plain = self._times_plain(num_rows)
        if times_plain:
            counts = [row.num_fixed for row in rows]
        else:
            counts = self._lengths(seqs, rows, num_rows)
        lengths = [self._window_of(count, row) for count, row in zip(counts, rows, strict=True)]
        self._add_probe(seqs, rows, lengths)
        self._has_ordered = any(lengths)
        self._rests_until = 0 if self._has_ordered or times_plain else self._num_rounds + self._tuning.rest_rounds
        return lengths

    @property
    def is_resting(self) -> bool:
        """Whether the policy ordered no drafts a few target rounds ago, so that none are expected yet."""
        return self._num_rounds < self._rests_until

    def _row(self, seq: Drafts) -> Row:
        """The row with as many drafts as it may ever have."""
        if seq.is_fixed or not self._adaptive:
            return Row(seq.acceptance, 0, seq.limit)
        return Row(seq.acceptance, min(seq.limit, self._max_drafts))

    def _times_plain(self, num_rows: int) -> bool:
        """Whether to measure plain decoding, which speculation has to beat: once at first, a few more times later."""
        num_timed = self.times.target_weight(num_rows)
        return num_timed == 0.0 or (num_timed < self._tuning.num_timed and self._is_exploring)

    @property
    def _is_exploring(self) -> bool:
        return (
            self._num_rounds % self._tuning.explore_every == self._tuning.explore_every - 1 and self._num_waiting == 0
        )

    def _is_on(self, rate: float, plain_rate: float, num_drafting: int, num_rows: int) -> bool:
        """Whether to speculate. Only the gain of most rows says something about the load. If the draft has caught up
        with only a few of many seqs, those speculate while it pays, and no longer just to learn from it."""
        if 2 * num_drafting < num_rows:
            self._switch.on_gap()
            return rate > plain_rate
        return self._switch.update(rate / plain_rate)

    def _verify_times(self, rows: Sequence[Row], num_rows: int) -> VerifyTimes:
        return self.times.verify_times(num_rows, num_fixed=sum(row.num_fixed for row in rows))

    # -- what is learned again ----------------------------------------------------------------------------------------

    def _add_probe(self, seqs: Sequence[Drafts], rows: Sequence[Row], lengths: list[int]) -> None:
        asleep = [index for index, row in enumerate(rows) if row.limit and not lengths[index]]
        if not asleep:
            return
        # The likeliest draft: it stays so until its verdict, and after a bad verdict another one is.
        index = max(asleep, key=lambda i: (rows[i].acceptance, -seqs[i].num_behind))
        num_rows = max(len(rows), self._num_rows)
        num_drafts = self._num_probed(rows[index])
        may_run = self._probes.may_run(
            self._probe_s(num_drafts, seqs[index].num_behind, num_rows),
            worth=self._probe_worth(num_rows),
            expected=rows[index].acceptance,
            is_busy=self._num_waiting > 0,
        )
        if may_run:
            lengths[index] = num_drafts

    def _num_probed(self, row: Row) -> int:
        num_drafts = floor(self._tuning.probe_share * self.times.target_s(1) / self.times.draft_step_s(1))
        return max(1, min(row.limit, self._tuning.num_unmeasured, num_drafts))

    def _probe_s(self, num_drafts: int, num_behind: int, num_rows: int) -> float:
        """Seconds that a probe costs."""
        verify_s = self.times.verify_times(num_rows)
        cost_s = self.times.draft_chunk_s(1 + num_behind) + num_drafts * self.times.draft_step_s(1)
        return cost_s + (verify_s(num_drafts) - verify_s(0))

    def _probe_worth(self, num_rows: int) -> float:
        best, plain = self._rates_if_all(num_rows, self._tuning.never_wrong)
        return max(self._tuning.least_worth, min(1.0, (best / plain - 1.0) / self._tuning.hoped_gain))

    def pays_to_catch_up(self, *, num_seqs: int, num_behind: int, num_left: int) -> bool:
        """Whether drafts would save more time over the `num_left` tokens that a seq may still get than the draft takes
        to catch up with `num_behind` tokens, with `num_seqs` running.

        Assumes decent drafts: if drafts are bad, only a seq that has caught up can show that they have improved.
        """
        if not (self._adaptive and self.times.is_measured):
            return True
        cost_s = self.times.draft_share * self.times.draft_chunk_s(num_behind)
        return num_left * self._saved_s(num_seqs) >= cost_s

    def _saved_s(self, num_seqs: int) -> float:
        """Seconds that drafts save per token with this many seqs; recomputed after every target round."""
        key = (num_seqs, self._num_rounds)
        if self._saving is None or self._saving[0] != key:
            rate, plain_rate = self._rates_if_all(num_seqs, max(self.prior.rate, self._tuning.decent_acceptance))
            self._saving = key, 1.0 / plain_rate - 1.0 / rate
        return self._saving[1]

    def _rates_if_all(self, num_seqs: int, acceptance: float) -> tuple[float, float]:
        """Tokens a second of this many seqs, with the best number of drafts if all had drafts and accepted them
        at this rate; and without drafts."""
        verify_s = self.times.verify_times(num_seqs)
        start_s, further_s = self.times.draft_start_s(num_seqs), self.times.draft_further_s(num_seqs)
        best = max(
            rate_of_alike(num_seqs, acceptance, num_drafts, verify_s, start_s + num_drafts * further_s)
            for num_drafts in range(1, self._max_drafts + 1)
        )
        return best, rate_of_alike(num_seqs, acceptance, 0, verify_s, 0.0)

    def should_extend(self, survival: float, acceptance: float) -> bool:
        """Whether a chain should get another draft. It only counts if all before it are accepted: `survival`."""
        return survival * acceptance >= max(self._tuning.min_survival, self.draft_step_cost)

    @property
    def draft_step_cost(self) -> float:
        """The cost of a draft step in tokens: in serial the target waits for it, in continuous it slows the target."""
        if self._step_cost is None:
            step_s = self.times.draft_step_s(1) if self.times.draft_is_known else 0.0
            self._step_cost = self.times.draft_share * step_s * self._price
        return self._step_cost
