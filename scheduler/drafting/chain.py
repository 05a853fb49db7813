"""What a draft engine holds of a seq: its history, and behind it a chain of drafts that nobody has confirmed yet.

The draft engine runs ahead while verdicts come in, so what it holds and what is committed drift apart and meet again.
The rule that keeps them together: a verdict is a mismatch unless every token that it commits, the last one included,
equals the chain so far. A match leaves the rest of the chain in place; a chain that is shorter than the commit is
extended by it. On a mismatch the epoch is over: the next row cuts the chain where the two part and goes on from the
commit, and what rounds of the old epoch still bring is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from scheduler.engines.seat import Seat


@dataclass(frozen=True, slots=True)
class Drafted:
    """One token of a chain."""

    token_id: int
    alternatives: tuple[int, ...] = ()  # what the draft would have chosen next, best first
    confidence: float = 1.0  # probability that the draft gave it
    odds: float = 1.0  # how likely it seemed, when it came, to be accepted behind those before it


@dataclass(slots=True, kw_only=True, eq=False)
class DraftSeat(Seat):
    """A seq's, or a branch's, place in a draft engine.

    Token counts of the engine, as they will be when every round sent so far has run: `num_agreed` committed tokens,
    then the chain, then `num_coming` drafts that nobody has seen yet; `num_computed` of them have KV, and of the first
    `num_exact` it is that of the exact model.
    """

    num_agreed: int = 0  # tokens held that are known to be those of the history
    chain: list[Drafted] = field(default_factory=list)
    num_coming: int = 0  # drafts on their way, of this epoch
    num_exact: int = 0
    ends_in_draft: bool = False  # the last token held is one of the engine's own
    epoch: int = 0
    is_cut: bool = False  # what the engine holds behind num_agreed is wrong
    is_catching_up: bool = False  # a round that computes history only is on its way

    @property
    def num_ahead(self) -> int:
        """Drafts ahead of the last commit, those on their way included."""
        return len(self.chain) + self.num_coming

    @property
    def survival(self) -> float:
        """How likely all of the chain is accepted."""
        return prod([drafted.odds for drafted in self.chain])

    @property
    def num_held(self) -> int:
        """Tokens that the engine will hold."""
        return self.num_agreed + self.num_ahead

    def lag(self, history: Sequence[int]) -> int:
        """Tokens of the history that have no KV here."""
        return len(history) - min(self.num_computed, self.num_agreed)

    def follow(self, history: Sequence[int]) -> Drafted | None:
        """Compare the chain with what has been committed -> the draft that the token behind the agreed ones
        contradicts. With it the epoch is over."""
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
        """The epoch is over: what is held behind the agreed tokens is wrong."""
        self.chain.clear()
        self.num_coming = 0
        self.num_exact = min(self.num_exact, self.num_agreed)
        self.is_cut = True
        self.epoch += 1

    def extend(self, num_ordered: int, drafted: Sequence[Drafted]) -> None:
        """Drafts have come that were ordered in this epoch."""
        self.num_coming -= num_ordered
        self.chain += drafted
