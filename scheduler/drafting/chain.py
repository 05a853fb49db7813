"""What a draft engine holds of a seq: its history, followed by a chain of drafts that are not confirmed yet.

The draft engine runs ahead while verdicts come in, so what it holds and what is committed drift apart and meet again.
One rule keeps them together: a verdict is a match if every token that it commits, including the last one, equals the
chain so far. After a match the rest of the chain stays; if the chain is shorter than the commit, the commit extends it.
A mismatch ends the epoch: the next row cuts the chain where the two differ and continues from the commit. Results of
rounds of the old epoch are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from scheduler.engines.slot import Slot


@dataclass(frozen=True, slots=True)
class Drafted:
    """One token of a chain."""

    token_id: int
    alternatives: tuple[int, ...] = ()  # what the draft would have chosen next, best first
    confidence: float = 1.0  # probability that the draft gave it
    odds: float = 1.0  # estimated probability, when it arrived, that it is accepted if all before it are


@dataclass(slots=True, kw_only=True, eq=False)
class DraftSlot(Slot):
    """The place of a seq, or of a branch, in a draft engine.

    Token counts of the engine, as they will be when every round sent so far has run: `num_agreed` committed tokens,
    then the chain, then `num_coming` drafts that have not arrived yet. `num_computed` of these tokens have KV. The KV
    of the first `num_exact` comes from the exact model.
    """

    num_agreed: int = 0  # tokens held that are known to equal the history
    chain: list[Drafted] = field(default_factory=list)
    num_coming: int = 0  # drafts in flight, of this epoch
    num_exact: int = 0
    ends_in_draft: bool = False  # the last token held is one of the engine's own
    epoch: int = 0
    is_cut: bool = False  # the tokens that the engine holds after num_agreed are wrong
    is_catching_up: bool = False  # a round that only computes history is in flight

    @property
    def num_ahead(self) -> int:
        """Drafts ahead of the last commit, including those in flight."""
        return len(self.chain) + self.num_coming

    @property
    def survival(self) -> float:
        """The probability that the whole chain is accepted."""
        return prod([drafted.odds for drafted in self.chain])

    @property
    def num_held(self) -> int:
        """Tokens that the engine will hold."""
        return self.num_agreed + self.num_ahead

    def lag(self, history: Sequence[int]) -> int:
        """Tokens of the history that have no KV in this engine."""
        return len(history) - min(self.num_computed, self.num_agreed)

    def follow(self, history: Sequence[int]) -> Drafted | None:
        """Compare the chain with what has been committed. Returns the draft that the token after the agreed ones
        contradicts; such a draft ends the epoch."""
        num_equal = 0
        for drafted, token_id in zip(self.chain, history[self.num_agreed :], strict=False):
            if drafted.token_id != token_id:
                break
            num_equal += 1
        self.num_agreed += num_equal
        del self.chain[:num_equal]
        if not self.chain or self.num_agreed == len(history):
            return None
        contradicted = self.chain[0]
        self.cut()
        return contradicted

    def cut(self) -> None:
        """End the epoch: the tokens held after the agreed ones are wrong."""
        self.chain.clear()
        self.num_coming = 0
        self.num_exact = min(self.num_exact, self.num_agreed)
        self.is_cut = True
        self.epoch += 1

    def extend(self, num_ordered: int, drafted: Sequence[Drafted]) -> None:
        """Append drafts that were ordered in this epoch."""
        self.num_coming -= num_ordered
        self.chain += drafted
