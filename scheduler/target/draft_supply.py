"""What the target needs to know about the draft sources."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from scheduler.requests.request import Seq
from scheduler.target.state import TargetState


class DraftSupply(Protocol):
    """Says which drafts the target verifies."""

    @property
    def target_waits(self) -> bool:
        """Whether no round may begin before drafts have come."""

    def expects_drafts(self, running: Iterable[TargetState]) -> bool:
        """Whether some seq may have drafts to verify when the current round comes back."""

    def choose(
        self, targets: Sequence[TargetState], now: float, *, num_other_tokens: int, num_waiting: int
    ) -> dict[TargetState, Sequence[int]]:
        """Drafts for each of these seqs, whose turn it is to decode. Seqs that are left out wait for theirs.

        `num_other_tokens`: prompt tokens in the same round; `num_waiting`: requests that wait for their first round.
        """

    def holds(self, target: TargetState) -> bool:
        """Whether the seq's next row waits for drafts, as `choose` decided."""

    def let_go(self, targets: Iterable[TargetState]) -> None:
        """These seqs wait for no drafts now."""

    def prefetch(self, seq: Seq, now: float) -> None:
        """The seq's prefix is on its way to the target's device: bring the draft's to its own."""

    def release(self, seq: Seq) -> None:
        """The seq needs no drafts before it runs again."""
