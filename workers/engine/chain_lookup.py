"""A draft of a draft: what followed the same tokens earlier in a seq. It needs no model and keeps no state of a seq.

The longest suffix that occurred before proposes what came after its latest occurrence (prompt lookup). The draft
computes several proposals in one forward and keeps those that it would have drafted itself (see DraftEngine), so they
change no draft. How many are worth a row of a forward is learned from how they fared, by the length of the suffix.
Counts alone decide, so that all ranks propose alike. Multi-level drafting: ML-SpecQD, arXiv 2503.13565.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log

import numpy as np
from numpy.typing import NDArray

from workers.engine.lower_draft import MAX_PROPOSED, NOTHING, LowerDraft, Proposal, Wanted
from workers.engine.seq_state import SeqTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """None is measured."""

    max_match: int = 8  # longer suffixes are trusted like this one
    min_worth: float = 0.3  # the probability that a proposal is kept, or it is not worth its row
    max_rate: float = 0.95
    explore_every: int = 16  # suffixes that seem worth nothing; one of them proposes a token nevertheless
    memory: float = 64.0  # proposals of a length that count, about


_TUNING = Tuning()


class _Trust:
    """How proposals after suffixes of one length fared."""

    def __init__(self) -> None:
        self._num_kept, self._num_judged = 1.0, 2.0
        self._num_refused = 0

    def num_worth(self) -> int:
        """How many tokens to propose."""
        rate = min(_TUNING.max_rate, self._num_kept / self._num_judged)
        if rate >= _TUNING.min_worth:
            return min(MAX_PROPOSED, floor(log(_TUNING.min_worth) / log(rate)))
        self._num_refused += 1
        return 1 if self._num_refused % _TUNING.explore_every == 0 else 0

    def observe(self, num_kept: int, num_judged: int) -> None:
        share = max(0.0, 1.0 - num_judged / _TUNING.memory)
        self._num_kept = share * self._num_kept + num_kept
        self._num_judged = share * self._num_judged + num_judged


class ChainLookup(LowerDraft):
    """One for an engine."""

    def __init__(self) -> None:
        super().__init__()
        self._trust = [_Trust() for _ in range(_TUNING.max_match + 1)]

    def propose_all(self, table: SeqTable, wanted: Sequence[Wanted]) -> list[Proposal]:
        return [self.propose(table.token_ids[slot, : table.lengths[slot]], most) for slot, most in wanted]

    def propose(self, token_ids: NDArray[np.int32], most: int) -> Proposal:
        """At most `most` tokens that may follow `token_ids` [num_tokens]."""
        match_len, end = longest_repeated(token_ids, _TUNING.max_match)
        if most <= 0 or match_len == 0:
            return NOTHING
        count = min(most, self._trust[match_len].num_worth())
        period = len(token_ids) - end  # after which the continuation would repeat itself
        return Proposal(token_ids[end + np.arange(count) % period].tolist(), match_len)

    def observe(self, proposal: Proposal, num_kept: int) -> None:
        super().observe(proposal, num_kept)
        if num_proposed := len(proposal.token_ids):
            self._trust[proposal.match_len].observe(num_kept, min(num_kept + 1, num_proposed))


def longest_repeated(token_ids: NDArray[np.int32], max_len: int) -> tuple[int, int]:
    """The length, at most `max_len`, of the longest suffix that occurs earlier too, and where its latest earlier
    occurrence ends; (0, 0) if the last token is new."""
    if len(token_ids) < 2:
        return 0, 0
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])
    if not len(ends):
        return 0, 0
    length = 1
    while length < max_len:
        longer = ends[ends >= length]
        longer = longer[token_ids[longer - length] == token_ids[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return length, int(ends[-1]) + 1
