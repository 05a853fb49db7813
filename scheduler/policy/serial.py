"""The serial pipeline: the target waits for the draft, so drafting and verifying add up."""

from collections.abc import Sequence

from scheduler.policy.goodput import Row, plan_serial
from scheduler.policy.policy import PLAIN_ROW, Drafts, SpeculationPolicy, Tuning
from scheduler.policy.round_times import RoundTimes
from scheduler.policy.step_times import VerifyTimes


class SerialPolicy(SpeculationPolicy):
    def __init__(self, *, max_drafts: int, adaptive: bool, tuning: Tuning | None = None) -> None:
        super().__init__(RoundTimes(), max_drafts=max_drafts, adaptive=adaptive, tuning=tuning)

    def _hold_s(self, seqs: Sequence[Drafts], verify_s: VerifyTimes, num_other_tokens: int) -> float:
        return 0.0  # the drafter knows when the drafts that it ordered have come

    @property
    def _verifies_any(self) -> bool:
        # Drafts that are never verified cannot show that they are better than thought.
        return self._has_ordered or super()._verifies_any

    def _window_of(self, num_drafts: int, row: Row) -> int:
        return num_drafts

    def _lengths(self, seqs: Sequence[Drafts], rows: list[Row], num_rows: int) -> list[int]:
        others = [PLAIN_ROW] * (num_rows - len(rows))
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

    def _explored(self, rows: Sequence[Row], lengths: list[int]) -> list[int]:
        """Now and then one draft more or less, to learn how long that takes."""
        if not self._is_exploring:
            return lengths
        change = 1 if self._num_rounds // self._tuning.explore_every % 2 else -1
        return [
            max(1, min(row.limit, length + change)) if row.limit and length else length
            for row, length in zip(rows, lengths, strict=True)
        ]
