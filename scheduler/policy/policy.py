"""How many drafts each seq gets and when the target waits for them: what gives the most tokens a second.

A pure class: it is told how long rounds took, and answers from what it has learned. Acceptance comes from the verdicts
of each seq (`acceptance.py`), times from the rounds (`round_times.py`), the best numbers from both (`goodput.py`), and
what falls asleep is probed now and then (`probing.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isinf
from typing import NamedTuple

from scheduler.policy.acceptance import AcceptancePrior, expected_tokens
from scheduler.policy.goodput import Row, SteadyState, pick_drafts, plan_serial, rate_of_alike, steady_state
from scheduler.policy.probing import Probes, Switch
from scheduler.policy.round_times import RoundTimes
from scheduler.policy.step_times import VerifyTimes

__all__ = ["Choice", "Drafts", "SpeculationPolicy"]

_NUM_UNMEASURED = 4  # drafts while nothing is known of the times ...
_MAX_UNMEASURED = 8  # ... of so many seqs at most, 1 of more
_EXPLORE_EVERY = 48  # target rounds: one with another number of drafts, to learn what it takes
_NUM_WAITED = 4  # draft rounds that the target waits for, to learn how fast the draft is alone; later one now and then
_NUM_TIMED = 4.0  # observations of plain decoding that average out the noise
_MAX_FINE = 8  # seqs up to which every number of steps to wait for is tried; more take longer to think about
_MAX_HELD = 64  # seqs; more hardly ever lack drafts all at once, and to think about it takes longer than it gives
_MAX_UNVERIFIED = 4  # target rounds that decode plainly while drafts come
_CHANGE_FOR = 1.02  # what running ahead must gain over waiting to be taken up
_DECENT = 0.7  # acceptance
_MIN_SURVIVAL = 0.05  # a draft that is less likely to be verified and accepted is not worth its power
_RESTART_STEPS = 0.5  # from a verdict to the first step of a new chain: half a step is still running
_HOLD_MARGIN = 2.0  # by how much drafts may come later than expected
_REST_ROUNDS = 8  # target rounds after which it is thought about anew whether to speculate
_PROBE_SHARE = 0.25  # of a target step: most that the drafts of a probe take
_HOPED = 0.5  # what drafts that are all accepted must gain for probes to be worth all that is saved up for them ...
_LEAST_WORTH = 0.05  # ... of which they get so much in any case, because times change as well
_NEVER_WRONG = 0.99  # acceptance
_PLAIN_ROW = Row(0.0, 0)  # a seq that decodes without drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """One seq that decodes, at the moment at which the target is free for it."""

    acceptance: float  # estimated probability that a draft is accepted (Acceptance.rate)
    num_ready: int  # drafts at hand
    num_coming: int  # further ones that rounds already sent to the draft engine will bring
    limit: int  # most drafts that it may verify (request, room); 0: it decodes plainly
    is_fixed: bool = False  # the request asked for exactly `limit` drafts a round: the policy has no say
    num_behind: int = 0  # tokens of its history that the draft engine would have to catch up with first
    may_hold: bool = True  # False: it was held, and its time is up


class Choice(NamedTuple):
    num_verify: int  # drafts to verify now; 0: plain decoding
    hold_s: float = 0.0  # > 0: do not take this seq now, but when more drafts came, at the latest after so long


class SpeculationPolicy:
    """One a scheduler.

    `adaptive` False: every seq drafts and verifies as much as its limit allows; only whether a continuous pipeline
    waits for drafts is still chosen. Continuous: `window`: most drafts ahead of the last commit, 0: chosen;
    `has_branches`: the draft is never idle while the target verifies, since it drafts for several verdicts.
    """

    def __init__(
        self, *, max_drafts: int, adaptive: bool, pipeline: str, window: int = 0, has_branches: bool = False
    ) -> None:
        self.prior = AcceptancePrior()  # of the draft model's drafts
        self._max_drafts = max_drafts
        self._adaptive = adaptive
        self.is_serial = pipeline == "serial"
        self._window = window
        self._has_branches = has_branches
        self._runs_ahead = not self.is_serial  # the draft goes on while the target verifies
        self.times = RoundTimes(is_serial=self.is_serial)
        self._switch = Switch()
        self._probes = Probes(self.prior)
        self._num_rounds = 0
        self._num_rows = 0  # of the last target round that decoded
        self._has_ordered = False  # drafts, when last asked for lengths
        self._rests_until = 0  # target round
        self._step_cost: float | None = None  # None: to be computed anew
        self._num_unverified = 0  # target rounds in a row without drafts
        self._num_waiting = 0
        self._price = 0.0  # tokens that a second was last expected to bring; 0: not known
        self._saving: tuple[tuple[int, int], float] | None = None  # with what it depends on
        self._steady: tuple[tuple[int, int], SteadyState] | None = None  # with what it depends on

    # -- what happened ------------------------------------------------------------------------------------------------

    def observe_target(self, *, num_seqs: int, num_tokens: int, num_context: int, run_s: float) -> None:
        """A target round over `num_tokens` tokens of `num_seqs` seqs took `run_s`. `num_context`: tokens in their KV
        caches."""
        self._num_rounds += 1
        self._step_cost = None
        self._switch.on_round()
        self._probes.on_round(run_s)
        self.times.observe_target(num_tokens, num_context, run_s, runs_ahead=self._runs_ahead)

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
        """For a target round of these seqs, all that decode: what each verifies, or how long it is held.

        `num_other_tokens`: of prompts in that round. `num_waiting`: requests that wait for their first round.
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
        may_hold = not self.is_serial and num_other_tokens == 0 and all(seq.may_hold for seq in seqs)
        if may_hold:
            hold_s = self._hold_for_fixed_s(seqs) or self._hold_s(seqs, self._slowed(verify_s))
            if hold_s > 0.0:
                return [Choice(0, hold_s)] * len(seqs)
        counts = self._worth_verifying(seqs, verify_s)
        self._num_unverified = 0 if any(counts) else self._num_unverified + 1
        return [Choice(count) for count in counts]

    def _slowed(self, verify_s: VerifyTimes) -> VerifyTimes:
        return verify_s.slowed(self.times.slowdown) if self._runs_ahead else verify_s

    def _worth_verifying(self, seqs: Sequence[Drafts], verify_s: VerifyTimes) -> list[int]:
        rows = [self._row_now(seq) for seq in seqs]
        counts, _ = pick_drafts(rows, verify_s, self._price or self._price_of(rows, verify_s))
        if (self.is_serial and self._has_ordered) or self._is_exploring:
            # Drafts that are never verified could not show that they are better than thought.
            counts = [max(count, min(1, row.most)) for count, row in zip(counts, rows, strict=True)]
        return counts

    def _price_of(self, rows: Sequence[Row], verify_s: VerifyTimes) -> float:
        """Tokens a second if all that is at hand is verified, or none of it, where that is more than was ever seen."""
        all_s = verify_s(sum(row.most for row in rows))
        if isinf(all_s):
            return sum(row.fixed_tokens for row in rows) / verify_s(sum(row.num_fixed for row in rows))
        return sum(expected_tokens(row.acceptance, row.most) for row in rows) / all_s

    def _row_now(self, seq: Drafts, num_more: int = 0) -> Row:
        at_hand = min(seq.num_ready + num_more, seq.limit)
        if seq.is_fixed or not self._adaptive:
            return Row(seq.acceptance, 0, at_hand)
        return Row(seq.acceptance, min(at_hand, self._max_drafts))

    def _hold_s(self, seqs: Sequence[Drafts], verify_s: VerifyTimes) -> float:
        """How long the target had better wait for drafts; it waits for all or none, so that no seq misses a round."""
        if (
            not self.times.draft_is_known
            or not all(seq.limit for seq in seqs)
            or not any(seq.num_coming for seq in seqs)
        ):
            return 0.0
        if len(seqs) > _MAX_HELD:
            return 0.0
        steady = self._steady_state(seqs, len(seqs))
        price = steady.rate if self._runs_ahead else self._price
        step_s = self.times.draft_step_s(len(seqs))
        waited_s = self.times.waited_step_s(len(seqs))
        restart_s = _RESTART_STEPS * step_s if self._runs_ahead else 0.0
        best_gain, best_wait = float("-inf"), 0
        most = max(seq.limit - seq.num_ready for seq in seqs)
        step = 1 if len(seqs) <= _MAX_FINE else 2
        for num_waited in range(0, most + 1, step):
            rows = [self._row_now(seq, num_waited if seq.num_coming else 0) for seq in seqs]
            counts, gain = pick_drafts(rows, verify_s, price)
            if self._runs_ahead:
                gain += self._value_of_going_on(rows, counts, steady, step_s)
            if num_waited:
                gain -= price * (num_waited * waited_s + restart_s)
            if gain > best_gain:
                best_gain, best_wait = gain, num_waited
        if best_wait == 0 and self._is_curious(seqs):
            best_wait = 2
        if best_wait == 0 and self._num_unverified >= _MAX_UNVERIFIED and not any(seq.num_ready for seq in seqs):
            best_wait = 1  # a draft that runs and is never verified could not show that it is worse than thought
        return _HOLD_MARGIN * (best_wait + 1) * step_s if best_wait else 0.0

    def _is_curious(self, seqs: Sequence[Drafts]) -> bool:
        """Whether to wait for once, to learn how fast the draft is when the target does not run beside it."""
        is_due = self.times.num_alone < _NUM_WAITED or self._is_exploring
        return self._adaptive and is_due and not any(seq.num_ready for seq in seqs)

    def _hold_for_fixed_s(self, seqs: Sequence[Drafts]) -> float:
        """A request that asked for so many drafts a round gets them, if they are on their way. All wait for it, as in
        the serial pipeline: one that is held alone misses the whole round of the others."""
        missing = max((seq.limit - seq.num_ready for seq in seqs if seq.is_fixed and seq.num_coming), default=0)
        if missing < 1:
            return 0.0
        step_s = self.times.draft_step_s(len(seqs)) if self.times.draft_is_known else self.times.target_s(1)
        return _HOLD_MARGIN * (missing + 1) * step_s

    def _value_of_going_on(
        self, rows: Sequence[Row], counts: Sequence[int], steady: SteadyState, step_s: float
    ) -> float:
        """Tokens that the drafts made meanwhile are worth, where the verdict lets the chain go on."""
        wait_s = steady.num_waited * self.times.waited_step_s(len(rows))
        wait_s += _RESTART_STEPS * step_s if steady.num_waited else 0.0
        saved = steady.rate * wait_s / len(rows)
        value = 0.0
        for row, count in zip(rows, counts, strict=True):
            a = row.acceptance
            more = expected_tokens(a, steady.num_at_hand) - expected_tokens(a, steady.num_waited)
            more /= 1.0 - a ** (steady.num_at_hand + 1.0) + a ** (steady.num_waited + 1.0)
            value += a ** (count + 1.0) * (max(0.0, more) + saved)
        return value

    # -- what the draft writes ----------------------------------------------------------------------------------------

    def draft_lengths(self, seqs: Sequence[Drafts]) -> list[int]:
        """For each seq: serial: drafts to order before the next target round; continuous: how many drafts ahead of the
        last commit its chain may run. 0: the draft does nothing for it.
        """
        self._step_cost = None
        rows = [self._row(seq) for seq in seqs]
        if not any(row.limit for row in rows):
            return [self._window_of(row.num_fixed, row) for row in rows]
        if not self.times.is_measured:
            most = _NUM_UNMEASURED if len(rows) <= _MAX_UNMEASURED else 1
            return [self._window_of(row.num_fixed or min(row.limit, most), row) for row in rows]
        num_rows = max(len(seqs), self._num_rows)
        times_plain = self._times_plain(num_rows)
        if times_plain:
            counts = [row.num_fixed for row in rows]
        elif self.is_serial:
            counts = self._serial_lengths(rows, num_rows)
        else:
            counts = self._continuous_lengths(seqs, rows, num_rows)
        lengths = [self._window_of(count, row) for count, row in zip(counts, rows, strict=True)]
        self._add_probe(seqs, rows, lengths)
        self._has_ordered = any(lengths)
        self._rests_until = 0 if self._has_ordered or times_plain else self._num_rounds + _REST_ROUNDS
        return lengths

    @property
    def is_resting(self) -> bool:
        """It was found that nobody had better draft, and is not yet to be thought about anew."""
        return self._num_rounds < self._rests_until

    def _row(self, seq: Drafts) -> Row:
        """With as many drafts as it may ever have."""
        if seq.is_fixed or not self._adaptive:
            return Row(seq.acceptance, 0, seq.limit)
        return Row(seq.acceptance, min(seq.limit, self._max_drafts))

    def _times_plain(self, num_rows: int) -> bool:
        """Whether what speculation has to beat is to be measured: once at once, a few times more in due course."""
        num_timed = self.times.target_weight(num_rows)
        return num_timed == 0.0 or (num_timed < _NUM_TIMED and self._is_exploring)

    @property
    def _is_exploring(self) -> bool:
        return self._num_rounds % _EXPLORE_EVERY == _EXPLORE_EVERY - 1 and self._num_waiting == 0

    def _serial_lengths(self, rows: list[Row], num_rows: int) -> list[int]:
        others = [_PLAIN_ROW] * (num_rows - len(rows))
        plan = plan_serial(
            rows + others,
            self._verify_times(rows, num_rows),
            self.times.draft_further_s,
            start_s=self.times.draft_start_s(len(rows)),
        )
        is_on = self._is_on(plan.rate, plan.plain_rate, len(rows), num_rows)
        self._price = plan.rate if is_on else plan.plain_rate
        if not is_on:
            return [row.num_fixed for row in rows]
        return self._explored(rows, plan.lengths[: len(rows)])

    def _is_on(self, rate: float, plain_rate: float, num_drafting: int, num_rows: int) -> bool:
        """Whether to speculate. Only what most rows could gain says something of the load: where the draft has caught
        up with a few of many, they speculate while that pays, and no longer for what may be learned."""
        if 2 * num_drafting < num_rows:
            self._switch.on_gap()
            return rate > plain_rate
        return self._switch.update(rate / plain_rate)

    def _explored(self, rows: Sequence[Row], lengths: list[int]) -> list[int]:
        """Now and then a draft more or less, to learn what that takes."""
        if not self._is_exploring:
            return lengths
        change = 1 if self._num_rounds // _EXPLORE_EVERY % 2 else -1
        return [
            max(1, min(row.limit, length + change)) if row.limit and length else length
            for row, length in zip(rows, lengths, strict=True)
        ]

    def _continuous_lengths(self, seqs: Sequence[Drafts], rows: list[Row], num_rows: int) -> list[int]:
        steady = self._steady_state(seqs, num_rows)
        others = [_PLAIN_ROW] * (num_rows - len(rows))
        verify_s = self._verify_times(rows, num_rows)
        waiting = plan_serial(rows + others, verify_s, self.times.waited_step_s)
        is_ahead = self._has_branches or steady.rate > waiting.rate * (1.0 if self._runs_ahead else _CHANGE_FOR)
        rate = steady.rate if is_ahead else waiting.rate
        is_on = self._is_on(rate, waiting.plain_rate, len(rows), num_rows)
        self._price = rate if is_on else waiting.plain_rate
        self._runs_ahead = is_ahead and is_on
        if not is_on:
            return [row.num_fixed for row in rows]
        if not is_ahead:
            return waiting.lengths[: len(rows)]
        counts, _ = pick_drafts(rows, verify_s.slowed(self.times.slowdown), rate)
        return counts

    def _steady_state(self, seqs: Sequence[Drafts], num_rows: int) -> SteadyState:
        """Computed anew when it may have changed, in a big batch not every round: that takes longer there."""
        key = (num_rows, self._num_rounds // (1 + num_rows // 8))
        if self._steady is None or self._steady[0] != key:
            rows = [self._row(seq) for seq in seqs] + [_PLAIN_ROW] * (num_rows - len(seqs))
            step_s = self.times.draft_step_s(len(seqs))
            verify_s = self._verify_times(rows, num_rows).slowed(self.times.slowdown)
            self._steady = (
                key,
                steady_state(
                    rows,
                    verify_s,
                    step_s,
                    waited_step_s=self.times.waited_step_s(len(seqs)),
                    restart_s=_RESTART_STEPS * step_s,
                ),
            )
        return self._steady[1]

    def _verify_times(self, rows: Sequence[Row], num_rows: int) -> VerifyTimes:
        return self.times.verify_times(num_rows, num_fixed=sum(row.num_fixed for row in rows))

    def _window_of(self, num_drafts: int, row: Row) -> int:
        """Those that are verified, and where the draft runs ahead those that are drafted meanwhile."""
        if num_drafts == 0 or not self._runs_ahead:
            return num_drafts
        meanwhile = self._max_drafts
        if self.times.target_is_known and self.times.draft_is_known:
            meanwhile = ceil(self.times.target_s(1) / self.times.draft_step_s(1)) + 1
        return max(1, min(num_drafts + meanwhile, self._window or 2 * max(self._max_drafts, num_drafts)))

    def _add_probe(self, seqs: Sequence[Drafts], rows: Sequence[Row], lengths: list[int]) -> None:
        asleep = [index for index, row in enumerate(rows) if row.limit and not lengths[index]]
        if not asleep:
            return
        # The likeliest one: it stays so until its verdict, and after a bad one another is.
        index = max(asleep, key=lambda i: (rows[i].acceptance, -seqs[i].num_behind))
        step_s = self.times.draft_step_s(1)
        num_drafts = floor(_PROBE_SHARE * self.times.target_s(1) / step_s)
        num_drafts = max(1, min(rows[index].limit, _NUM_UNMEASURED, num_drafts))
        num_rows = max(len(rows), self._num_rows)
        verify_s = self.times.verify_times(num_rows)
        cost_s = self.times.draft_chunk_s(1 + seqs[index].num_behind) + num_drafts * step_s
        cost_s += verify_s(num_drafts) - verify_s(0)
        best, plain = self._rates_if_all(num_rows, _NEVER_WRONG)
        worth = max(_LEAST_WORTH, min(1.0, (best / plain - 1.0) / _HOPED))
        if self._probes.may_run(cost_s, worth=worth, expected=rows[index].acceptance, is_busy=self._num_waiting > 0):
            lengths[index] = num_drafts

    def pays_to_catch_up(self, *, num_seqs: int, num_behind: int, num_left: int) -> bool:
        """Whether drafts would save more over the `num_left` tokens that a seq may still get than it takes the draft to
        catch up with `num_behind`, where `num_seqs` run.

        With decent drafts: of bad ones only a seq that has caught up can show that they have become better.
        """
        if not (self._adaptive and self.times.is_measured):
            return True
        cost_s = self.times.draft_share * self.times.draft_chunk_s(num_behind)
        return num_left * self._saved_s(num_seqs) >= cost_s

    def _saved_s(self, num_seqs: int) -> float:
        """Seconds that drafts save for each token, where so many seqs run; computed anew with every target round."""
        key = (num_seqs, self._num_rounds)
        if self._saving is None or self._saving[0] != key:
            rate, plain_rate = self._rates_if_all(num_seqs, max(self.prior.rate, _DECENT))
            self._saving = key, 1.0 / plain_rate - 1.0 / rate
        return self._saving[1]

    def _rates_if_all(self, num_seqs: int, acceptance: float) -> tuple[float, float]:
        """Tokens a second of so many seqs if drafts of all were at hand and accepted like that, the best number of
        them; and without drafts."""
        verify_s = self.times.verify_times(num_seqs)
        start_s, further_s = self.times.draft_start_s(num_seqs), self.times.draft_further_s(num_seqs)
        best = max(
            rate_of_alike(num_seqs, acceptance, num_drafts, verify_s, start_s + num_drafts * further_s)
            for num_drafts in range(1, self._max_drafts + 1)
        )
        return best, rate_of_alike(num_seqs, acceptance, 0, verify_s, 0.0)

    def should_extend(self, survival: float, acceptance: float) -> bool:
        """Whether a chain should get another draft, which counts only if all before it are accepted: `survival`."""
        return survival * acceptance >= max(_MIN_SURVIVAL, self.draft_step_cost)

    @property
    def draft_step_cost(self) -> float:
        """Tokens that a draft step costs: in serial the target waits for it, in continuous it slows the target."""
        if self._step_cost is None:
            step_s = self.times.draft_step_s(1) if self.times.draft_is_known else 0.0
            self._step_cost = self.times.draft_share * step_s * self._price
        return self._step_cost
