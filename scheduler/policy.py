"""How many drafts each seq gets and when the target waits for them: what gives the most tokens a second.

A pure class: it is told how long rounds took, and answers from what it has learned. Acceptance comes from the verdicts
of each seq (`scheduler/acceptance.py`), times from the rounds (`scheduler/step_times.py`), the best numbers from both
(`scheduler/goodput.py`), and what falls asleep is probed now and then (`scheduler/probing.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, prod
from typing import NamedTuple

from scheduler.acceptance import AcceptancePrior, expected_tokens
from scheduler.goodput import Row, SteadyState, pick_drafts, plan_serial, steady_state
from scheduler.probing import Probes, Switch
from scheduler.step_times import DraftTimes, StepTimes

__all__ = ["Choice", "Drafts", "SpeculationPolicy"]

_NUM_UNMEASURED = 4  # drafts while nothing is known of the times
_EXPLORE_EVERY = 48  # target rounds: one with another number of drafts, to learn its time
_MIN_SURVIVAL = 0.05  # a draft that is less likely to be verified and accepted is not worth its power
_MAX_SLOWDOWN = 1.5
_RESTART_STEPS = 0.5  # from a verdict to the first step of a new chain: half a step is still running


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
    """One a scheduler, for one source of drafts that run on an engine.

    `adaptive` False: every seq drafts and verifies as much as its limit allows; only whether a continuous pipeline
    waits for drafts is still chosen. `window`: most drafts ahead of the last commit (continuous), 0: chosen.
    """

    def __init__(self, *, max_drafts: int, adaptive: bool, pipeline: str, window: int = 0) -> None:
        self.prior = AcceptancePrior()
        self._max_drafts = max_drafts
        self._adaptive = adaptive
        self._is_serial = pipeline == "serial"
        self._window = window
        self._target = StepTimes()
        self._draft = DraftTimes()
        self._slowdown = 1.03 if not self._is_serial else 1.0  # of a target round while the draft runs
        self._switch = Switch()
        self._probes = Probes(self.prior)
        self._num_rounds = 0
        self._num_waiting = 0
        self._price = 0.0  # tokens that a second was last expected to bring; 0: not known

    # -- what happened ------------------------------------------------------------------------------------------------

    def observe_target(
        self, *, num_seqs: int, num_tokens: int, num_context: int, run_s: float, is_drafting: bool = False
    ) -> None:
        """A target round over `num_tokens` tokens of `num_seqs` seqs took `run_s`, from when the group could take it
        to its answer. `num_context`: tokens in the KV cache of those seqs. `is_drafting`: draft rounds ran beside it.
        """
        self._num_rounds += 1
        self._switch.on_round()
        self._probes.on_round(run_s)
        if is_drafting:
            self._learn_slowdown(num_tokens, num_context, run_s)
            run_s /= self._slowdown
        self._target.observe(num_tokens, run_s, num_context=num_context)

    def _learn_slowdown(self, num_tokens: int, num_context: int, run_s: float) -> None:
        if self._target.weight(num_tokens) < 4:
            return
        ratio = run_s / self._target.predict(num_tokens, num_context=num_context)
        self._slowdown += 0.02 * (min(ratio, _MAX_SLOWDOWN) - self._slowdown)
        self._slowdown = min(_MAX_SLOWDOWN, max(1.0, self._slowdown))

    def observe_draft(self, *, num_seqs: int, num_steps: int, num_chunk_tokens: int, run_s: float) -> None:
        """A draft round took `run_s`: a forward over `num_chunk_tokens` tokens that it caught up with, behind whose
        last ones the first drafts were chosen, then one for each further draft of `num_seqs` seqs (`num_steps` in all).
        """
        self._draft.observe(num_seqs=num_seqs, num_steps=num_steps, num_chunk_tokens=num_chunk_tokens, run_s=run_s)

    @property
    def _is_measured(self) -> bool:
        return self._target.is_known and self._draft.is_known

    # -- what the target verifies -------------------------------------------------------------------------------------

    def choose(self, seqs: Sequence[Drafts], *, num_other_tokens: int, num_waiting: int) -> list[Choice]:
        """For a target round of these seqs: what each verifies, or how long it is held.

        `num_other_tokens`: tokens of prompts in that round, and rows that decode plainly unless they are among `seqs`
        with limit 0. `num_waiting`: requests that wait for their first round.
        """
        self._num_waiting = num_waiting
        if not seqs:
            return []
        if not self._is_measured:
            return [Choice(min(seq.num_ready, seq.limit)) for seq in seqs]
        if self._is_serial:
            return [Choice(count) for count in self._worth_verifying(seqs, num_other_tokens)]
        return self._choose_continuous(seqs, num_other_tokens)

    def _worth_verifying(self, seqs: Sequence[Drafts], num_other_tokens: int) -> list[int]:
        rows = [self._row_now(seq) for seq in seqs]
        verify_s = self._verify_s(len(rows), num_other_tokens)
        tokens = sum(expected_tokens(row.acceptance, max(row.limit, row.num_fixed)) for row in rows)
        price = self._price or tokens / verify_s(sum(max(row.limit, row.num_fixed) for row in rows))
        return pick_drafts(rows, verify_s, price)[0]

    def _row_now(self, seq: Drafts, num_more: int = 0) -> Row:
        at_hand = min(seq.num_ready + num_more, seq.limit)
        if seq.is_fixed or not self._adaptive:
            return Row(seq.acceptance, 0, at_hand)
        return Row(seq.acceptance, min(at_hand, self._max_drafts))

    def _verify_s(self, num_rows: int, num_other_tokens: int) -> "_VerifyTimes":
        return _VerifyTimes(self._target, num_rows, num_other_tokens, 1.0)

    def _choose_continuous(self, seqs: Sequence[Drafts], num_other_tokens: int) -> list[Choice]:
        steady = self._steady_state(seqs)
        step_s = self._draft.step_s(sum(seq.limit > 0 for seq in seqs))
        verify_s = self._verify_s(len(seqs), num_other_tokens).slowed(self._slowdown)
        may_hold = num_other_tokens == 0 and all(seq.limit and seq.may_hold for seq in seqs)
        most = max(seq.num_coming for seq in seqs) and max(seq.limit - seq.num_ready for seq in seqs)
        best_gain, best_counts, best_wait = float("-inf"), [0] * len(seqs), 0
        for num_waited in range(max(0, most) + 1 if may_hold else 1):
            rows = [self._row_now(seq, num_waited if seq.num_coming else 0) for seq in seqs]
            counts, gain = pick_drafts(rows, verify_s, steady.rate)
            gain += self._value_of_going_on(rows, counts, steady, step_s)
            if num_waited:
                gain -= steady.rate * (num_waited + _RESTART_STEPS) * step_s
            if gain > best_gain:
                best_gain, best_counts, best_wait = gain, counts, num_waited
        if best_wait:
            hold_s = 2 * (best_wait + 1) * step_s
            return [Choice(0, hold_s) for _ in seqs]
        return [
            self._held_for_fixed(seq, step_s) or Choice(min(count, seq.num_ready))
            for seq, count in zip(seqs, best_counts, strict=True)
        ]

    def _held_for_fixed(self, seq: Drafts, step_s: float) -> Choice | None:
        """A request that asked for so many drafts a round gets them, if they are on their way."""
        missing = seq.limit - seq.num_ready
        if not seq.is_fixed or missing <= 0 or seq.num_coming == 0 or not seq.may_hold:
            return None
        return Choice(0, 2 * (missing + 1) * step_s)

    def _value_of_going_on(
        self, rows: Sequence[Row], counts: Sequence[int], steady: SteadyState, step_s: float
    ) -> float:
        """Tokens that the drafts made meanwhile are worth, where the verdict lets the chain go on."""
        wait_s = steady.num_waited * step_s + (_RESTART_STEPS * step_s if steady.num_waited else 0.0)
        saved = steady.rate * wait_s / len(rows)
        value = 0.0
        for row, count in zip(rows, counts, strict=True):
            a = row.acceptance
            more = expected_tokens(a, steady.num_at_hand) - expected_tokens(a, steady.num_waited)
            more /= 1.0 - a ** (steady.num_at_hand + 1.0) + a ** (steady.num_waited + 1.0)
            value += a ** (count + 1.0) * (max(0.0, more) + saved)
        return value

    def _steady_state(self, seqs: Sequence[Drafts]) -> SteadyState:
        rows = [self._row(seq) for seq in seqs]
        step_s = self._draft.step_s(sum(max(row.limit, row.num_fixed) > 0 for row in rows))
        verify_s = self._verify_s(len(rows), 0).slowed(self._slowdown)
        steady = steady_state(rows, verify_s, step_s, restart_s=_RESTART_STEPS * step_s)
        self._price = steady.rate
        return steady

    def _row(self, seq: Drafts) -> Row:
        """With as many drafts as it may ever have."""
        if seq.is_fixed or not self._adaptive:
            return Row(seq.acceptance, 0, seq.limit)
        return Row(seq.acceptance, min(seq.limit, self._max_drafts))

    # -- what the draft writes ----------------------------------------------------------------------------------------

    def draft_lengths(self, seqs: Sequence[Drafts]) -> list[int]:
        """For each seq: serial: drafts to order before the next target round; continuous: how many drafts ahead of the
        last commit its chain may run. 0: the draft does nothing for it.
        """
        rows = [self._row(seq) for seq in seqs]
        if not any(row.limit for row in rows):
            return [self._window_of(row.num_fixed, row) if row.num_fixed else 0 for row in rows]
        if not self._is_measured:
            return [self._window_of(min(row.limit, _NUM_UNMEASURED) or row.num_fixed, row) for row in rows]
        lengths = self._serial_lengths(rows) if self._is_serial else self._windows(seqs, rows)
        self._add_probe(seqs, rows, lengths)
        return lengths

    def _serial_lengths(self, rows: Sequence[Row]) -> list[int]:
        verify_s = self._verify_s(len(rows), 0)
        plan = plan_serial(rows, verify_s, self._draft.step_s)
        self._price = plan.rate
        if not self._switch.update(plan.rate / plan.plain_rate):
            return [row.num_fixed for row in rows]
        return self._explored(rows, plan.lengths)

    def _explored(self, rows: Sequence[Row], lengths: list[int]) -> list[int]:
        """Now and then a draft more or less, or none where plain decoding was never timed."""
        turn, phase = divmod(self._num_rounds, _EXPLORE_EVERY)
        if self._target.weight(len(rows)) == 0.0:
            return [row.num_fixed for row in rows]
        if phase != _EXPLORE_EVERY - 1 or self._num_waiting:
            return lengths
        change = 1 if turn % 2 else -1
        return [
            max(1, min(row.limit, length + change)) if row.limit and length else length
            for row, length in zip(rows, lengths, strict=True)
        ]

    def _windows(self, seqs: Sequence[Drafts], rows: Sequence[Row]) -> list[int]:
        steady = self._steady_state(seqs)
        plain_rate = sum(row.fixed_tokens for row in rows) / self._verify_s(len(rows), 0)(0)
        if not self._switch.update(steady.rate / plain_rate):
            return [self._window_of(row.num_fixed, row) if row.num_fixed else 0 for row in rows]
        verify_s = self._verify_s(len(rows), 0).slowed(self._slowdown)
        counts, _ = pick_drafts(rows, verify_s, steady.rate)
        return [self._window_of(count, row) if count else 0 for count, row in zip(counts, rows, strict=True)]

    def _window_of(self, num_drafts: int, row: Row) -> int:
        """Serial: the drafts; continuous: those that are verified and those that are drafted meanwhile."""
        if self._is_serial:
            return num_drafts
        meanwhile = self._max_drafts
        if self._is_measured:
            meanwhile = ceil(self._target.predict(1) / self._draft.step_s(1)) + 1
        most = self._window or 2 * max(self._max_drafts, num_drafts)
        return max(1, min(num_drafts + meanwhile, most))

    def _add_probe(self, seqs: Sequence[Drafts], rows: Sequence[Row], lengths: list[int]) -> None:
        asleep = [index for index, row in enumerate(rows) if row.limit and not lengths[index]]
        if not asleep:
            return
        # The likeliest one: it stays so until its verdict, and after a bad one another is.
        index = max(asleep, key=lambda i: (rows[i].acceptance, -seqs[i].num_behind))
        step_s = self._draft.step_s(1)
        num_drafts = max(1, min(rows[index].limit, _NUM_UNMEASURED, floor(0.25 * self._target.predict(1) / step_s)))
        cost_s = self._draft.chunk_s(1 + seqs[index].num_behind) + num_drafts * step_s
        if self._probes.may_run(cost_s, is_busy=self._num_waiting > 0):
            lengths[index] = num_drafts

    def should_extend(self, confidences: Sequence[float], acceptance: float) -> bool:
        """Whether a chain with these drafts since the last commit should get another one.

        `confidences`: the probability that the draft gave each of them. How likely the target agrees lies between that
        and the seq's acceptance. Another draft counts only if all before it are accepted.
        """
        survival = prod(0.5 * (confidence + acceptance) for confidence in confidences)
        return survival * acceptance >= self._min_survival()

    def _min_survival(self) -> float:
        if not self._is_measured:
            return _MIN_SURVIVAL
        share = 1.0 if self._is_serial else self._slowdown - 1.0
        return max(_MIN_SURVIVAL, share * self._draft.step_s(1) * self._price)


class _VerifyTimes:
    """Seconds of a target round by the drafts in it.

    Prompts in the round are not its seqs' doing: only what drafts add to it counts on top of a round without prompts.
    """

    __slots__ = ("_base_s", "_num_before", "_slowdown", "_times")

    def __init__(self, times: StepTimes, num_rows: int, num_other_tokens: int, slowdown: float) -> None:
        self._times = times
        self._num_before = num_rows + num_other_tokens
        self._base_s = times.predict(num_rows) - times.predict(self._num_before)
        self._slowdown = slowdown

    def __call__(self, num_drafts: float) -> float:
        return self._slowdown * (self._base_s + self._times.predict(self._num_before + num_drafts))

    def slowed(self, slowdown: float) -> "_VerifyTimes":
        self._slowdown = slowdown
        return self
