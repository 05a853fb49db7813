"""How long rounds take: the target's, the draft's at the same time and alone, and how much each slows the other.

Pure classes that learn from observed rounds. Single forwards are in `scheduler/policy/step_times.py`.
"""

from dataclasses import dataclass

from scheduler.policy.step_times import DraftTimes, StepTimes, VerifyTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Settings of `RoundTimes`. Together they reach what the simulations of tests/unit/test_policy.py demand. None is
    measured."""

    num_measured: int = 3  # draft rounds to see before the policy relies on times
    num_trusted: float = 4.0  # target rounds of a size to see before one of that size can show a slowdown
    first_slowdown: float = 1.03  # of a target round during a draft round, until one is seen
    max_slowdown: float = 1.5  # a larger one counts as this: it must have another cause
    learned: float = 0.02  # weight of a new slowdown in the mean
    # Until a draft step is seen, n seqs are taken to need first_step_s * (1 + first_row_share * n).
    first_step_s: float = 1e-3
    first_row_share: float = 0.1


class RoundTimes:
    """Times when draft and target never run at the same time."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()
        self._target = StepTimes()
        self._draft = DraftTimes()
        self._num_draft_rounds = 0

    # -- what happened ------------------------------------------------------------------------------------------------

    def observe_target(self, num_tokens: int, num_context: int, run_s: float) -> None:
        """A target round over `num_tokens` tokens, which attend to `num_context` cached ones, took `run_s`."""
        self._target.observe(num_tokens, run_s, num_context=num_context)

    def observe_draft(
        self, *, num_seqs: int, num_steps: int, num_chunk_tokens: int, run_s: float, beside_target: bool
    ) -> None:
        """A draft round took `run_s`. Its first forward computed `num_chunk_tokens` tokens, after the last of which the
        first drafts were chosen; then each further draft of `num_seqs` seqs took one forward (`num_steps` in all).
        `beside_target`: a target round ran meanwhile.
        """
        self._num_draft_rounds += 1
        for times in self._times_of(beside_target=beside_target):
            times.observe(num_seqs=num_seqs, num_steps=num_steps, num_chunk_tokens=num_chunk_tokens, run_s=run_s)

    def _times_of(self, *, beside_target: bool) -> list[DraftTimes]:
        return [self._draft]

    # -- the target ---------------------------------------------------------------------------------------------------

    @property
    def target_is_known(self) -> bool:
        return self._target.is_known

    def target_weight(self, num_tokens: int) -> float:
        """The number of recent target rounds over this many tokens; older ones count less."""
        return self._target.weight(num_tokens)

    def target_s(self, num_tokens: int) -> float:
        """Seconds of a target round over this many tokens."""
        return self._target.predict(num_tokens)

    def verify_times(self, num_rows: int, *, num_other_tokens: int = 0, num_fixed: int = 0) -> VerifyTimes:
        """Times of target rounds of `num_rows` seqs with `num_other_tokens` prompt tokens; `num_fixed`: drafts whose
        number is not the policy's choice."""
        return VerifyTimes(self._target, num_rows, num_other_tokens, num_fixed=num_fixed)

    # -- the draft ----------------------------------------------------------------------------------------------------

    @property
    def draft_is_known(self) -> bool:
        return self._draft.is_known

    @property
    def is_measured(self) -> bool:
        """Whether both sides were seen often enough."""
        return self._target.is_known and self._num_draft_rounds >= self._tuning.num_measured

    @property
    def draft_share(self) -> float:
        """Seconds that the target loses per second of drafting: here it waits."""
        return 1.0

    def draft_step_s(self, num_seqs: int) -> float:
        """Seconds of a draft step for this many seqs; a guess until one is seen."""
        if self._draft.is_known:
            return self._draft.step_s(num_seqs)
        return self._tuning.first_step_s * (1.0 + self._tuning.first_row_share * num_seqs)

    def draft_start_s(self, num_seqs: int) -> float:
        """Seconds that a draft round takes apart from its drafts."""
        return self._draft.start_s(num_seqs)

    def draft_further_s(self, num_seqs: int) -> float:
        """Seconds that each draft for each of `num_seqs` seqs adds to a round."""
        return self._draft.further_s(num_seqs)

    def draft_chunk_s(self, num_tokens: int) -> float:
        """Seconds of a draft forward that only catches up."""
        return self._draft.chunk_s(num_tokens)


class OverlappedTimes(RoundTimes):
    """Times when the draft may continue while the target verifies."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        super().__init__(tuning)
        self.runs_ahead = True  # the draft continues while the target verifies; the policy decides it
        self.slowdown = self._tuning.first_slowdown  # of a target round while the draft runs
        self._draft_alone = DraftTimes()  # times of those rounds: the target may share memory with the draft
        self._has_drafted = False  # since the last target round

    def observe_target(self, num_tokens: int, num_context: int, run_s: float) -> None:
        """If the draft has run since the last round, it slowed this one down."""
        if self._has_drafted and self.runs_ahead:
            self._learn_slowdown(num_tokens, num_context, run_s)
            run_s /= self.slowdown
        self._has_drafted = False
        super().observe_target(num_tokens, num_context, run_s)

    def _learn_slowdown(self, num_tokens: int, num_context: int, run_s: float) -> None:
        tuning = self._tuning
        if self._target.weight(num_tokens) < tuning.num_trusted:
            return
        ratio = run_s / self._target.predict(num_tokens, num_context=num_context)
        slowdown = self.slowdown + tuning.learned * (min(ratio, tuning.max_slowdown) - self.slowdown)
        self.slowdown = min(tuning.max_slowdown, max(1.0, slowdown))

    def observe_draft(
        self, *, num_seqs: int, num_steps: int, num_chunk_tokens: int, run_s: float, beside_target: bool
    ) -> None:
        self._has_drafted = True
        super().observe_draft(
            num_seqs=num_seqs,
            num_steps=num_steps,
            num_chunk_tokens=num_chunk_tokens,
            run_s=run_s,
            beside_target=beside_target,
        )

    def _times_of(self, *, beside_target: bool) -> list[DraftTimes]:
        if not self._draft.is_known:
            return [self._draft, self._draft_alone]
        return [self._draft] if beside_target else [self._draft_alone]

    @property
    def draft_share(self) -> float:
        """Seconds that the target loses per second of drafting: here it is slowed down."""
        return self.slowdown - 1.0

    def waited_step_s(self, num_seqs: int) -> float:
        """Seconds of a draft step that the target waits for."""
        return min(self._draft_alone.step_s(num_seqs), self._draft.step_s(num_seqs))
