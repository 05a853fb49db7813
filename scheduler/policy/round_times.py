"""What rounds take: of the target, of the draft beside it and alone, and how much one slows the other.

A pure class that learns from the rounds it is told of; single forwards are `scheduler/policy/step_times.py`'s.
"""

from scheduler.policy.step_times import DraftTimes, StepTimes, VerifyTimes

__all__ = ["RoundTimes"]

_NUM_MEASURED = 3  # draft rounds: before so many were seen, their times are not known
_NUM_TRUSTED = 4  # target rounds of a size, from which on it can tell a slowdown
_FIRST_SLOWDOWN, _MAX_SLOWDOWN = 1.03, 1.5
_LEARNED = 0.02  # of a slowdown that was seen


class RoundTimes:
    """`is_serial`: draft and target never run at the same time."""

    def __init__(self, *, is_serial: bool) -> None:
        self.is_serial = is_serial
        self.slowdown = 1.0 if is_serial else _FIRST_SLOWDOWN  # of a target round while the draft runs
        self.num_alone = 0  # draft rounds that the target waited for
        self._target = StepTimes()
        self._draft = DraftTimes()  # of draft rounds beside a target round, and of all where nothing runs beside them
        self._draft_alone = DraftTimes()  # of those that the target waited for: it may share memory with the draft
        self._num_draft_rounds = 0
        self._has_drafted = False  # since the last target round

    # -- what happened ------------------------------------------------------------------------------------------------

    def observe_target(self, num_tokens: int, num_context: int, run_s: float, *, runs_ahead: bool) -> None:
        """A target round over `num_tokens` tokens that attend to `num_context` cached ones took `run_s`. `runs_ahead`:
        the draft goes on while the target verifies; where it did so since the last round, it has slowed this one down.
        """
        if self._has_drafted and runs_ahead:
            self._learn_slowdown(num_tokens, num_context, run_s)
            run_s /= self.slowdown
        self._has_drafted = False
        self._target.observe(num_tokens, run_s, num_context=num_context)

    def _learn_slowdown(self, num_tokens: int, num_context: int, run_s: float) -> None:
        if self._target.weight(num_tokens) < _NUM_TRUSTED:
            return
        ratio = run_s / self._target.predict(num_tokens, num_context=num_context)
        slowdown = self.slowdown + _LEARNED * (min(ratio, _MAX_SLOWDOWN) - self.slowdown)
        self.slowdown = min(_MAX_SLOWDOWN, max(1.0, slowdown))

    def observe_draft(
        self, *, num_seqs: int, num_steps: int, num_chunk_tokens: int, run_s: float, beside_target: bool
    ) -> None:
        """A draft round took `run_s`: a forward over `num_chunk_tokens` tokens that it caught up with, behind whose
        last ones the first drafts were chosen, then one for each further draft of `num_seqs` seqs (`num_steps` in all).
        `beside_target`: a target round ran meanwhile.
        """
        self._has_drafted = True
        self._num_draft_rounds += 1
        self.num_alone += not beside_target
        times = [self._draft] if beside_target else [self._draft_alone]
        if self.is_serial or not self._draft.is_known:
            times = [self._draft, self._draft_alone]
        for each in times:
            each.observe(num_seqs=num_seqs, num_steps=num_steps, num_chunk_tokens=num_chunk_tokens, run_s=run_s)

    # -- the target ---------------------------------------------------------------------------------------------------

    @property
    def target_is_known(self) -> bool:
        return self._target.is_known

    def target_weight(self, num_tokens: int) -> float:
        """How many recent target rounds over so many tokens there were, the older the less they count."""
        return self._target.weight(num_tokens)

    def target_s(self, num_tokens: int) -> float:
        """Seconds of a target round over so many tokens."""
        return self._target.predict(num_tokens)

    def verify_times(self, num_rows: int, *, num_other_tokens: int = 0, num_fixed: int = 0) -> VerifyTimes:
        """Of target rounds of `num_rows` seqs, with `num_other_tokens` of prompts; `num_fixed`: drafts that nobody has
        a say in."""
        return VerifyTimes(self._target, num_rows, num_other_tokens, num_fixed=num_fixed)

    # -- the draft ----------------------------------------------------------------------------------------------------

    @property
    def draft_is_known(self) -> bool:
        return self._draft.is_known

    @property
    def is_measured(self) -> bool:
        """Both sides, often enough to reckon with."""
        return self._target.is_known and self._num_draft_rounds >= _NUM_MEASURED

    @property
    def draft_share(self) -> float:
        """Seconds that the target loses by a second of the draft's: serial, it waits; else it is slowed down."""
        return 1.0 if self.is_serial else self.slowdown - 1.0

    def draft_step_s(self, num_seqs: int) -> float:
        """Seconds of a draft step for so many seqs; a guess until one was seen."""
        return self._draft.step_s(num_seqs) if self._draft.is_known else 1e-3 * (1.0 + 0.1 * num_seqs)

    def waited_step_s(self, num_seqs: int) -> float:
        """Seconds of a draft step that the target waits for."""
        return min(self._draft_alone.step_s(num_seqs), self._draft.step_s(num_seqs))

    def draft_start_s(self, num_seqs: int) -> float:
        """Seconds that a draft round takes however many drafts it brings."""
        return self._draft.start_s(num_seqs)

    def draft_further_s(self, num_seqs: int) -> float:
        """Seconds that each draft for each of `num_seqs` seqs adds to a round."""
        return self._draft.further_s(num_seqs)

    def draft_chunk_s(self, num_tokens: int) -> float:
        """Seconds of a draft forward that only catches up."""
        return self._draft.chunk_s(num_tokens)
