"""A suffix automaton that grows token by token: every repeated context of a text, its count and what followed it.

A state represents the strings that end at the same places. Its suffix link leads to the longest string that ends at
more places. So the longest suffix of the text that occurred before is the link of the last state, and the tokens that
followed a context are the transitions of its state. Source: Blumer et al. 1985; for drafting arXiv 2411.10666.

No light library does this: arctic-inference, which serving systems use, has to be compiled and plugs itself into vLLM,
and the automata on PyPI are built once.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

SEPARATOR = -1  # between unrelated texts
_NONE, _MANY = -2, -3  # stand in for a transition's token


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Bounds of the work per token."""

    max_counted: int = 64  # contexts counted for each token, longest first, in texts like "a a a a"; not measured
    max_branches: int = 64  # a context that this many different tokens followed predicts nothing; not measured


_TUNING = Tuning()


class Continuation(NamedTuple):
    token_id: int
    probability: float  # share of the context's occurrences that this token followed
    state: int  # of the context followed by the token


class Match(NamedTuple):
    state: int
    length: int  # tokens of the context


class SuffixAutomaton:
    """The text so far. `extend` takes amortised constant time and about 130 bytes per token."""

    def __init__(self) -> None:
        # By state. Most have one transition, which is kept here; those with more have a dict.
        self._length = array("i", [0])
        self._link = array("i", [-1])
        self._count = array("i", [0])  # places where the state's strings end
        self._last_end = array("i", [0])  # the latest of those places
        self._only_token = array("i", [_NONE])
        self._only_next = array("i", [0])
        self._branches: dict[int, dict[int, int]] = {}
        self._end = 0  # the state of the whole text
        self.num_tokens = 0

    @property
    def num_states(self) -> int:
        return len(self._length)

    # -- growing ------------------------------------------------------------------------------------------------------

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self._append(token_id)

    def _append(self, token_id: int) -> None:
        self.num_tokens += 1
        end = self._add_state(self._length[self._end] + 1)
        state = self._end
        self._end = end
        found = -1
        while state >= 0 and (found := self._step(state, token_id)) < 0:
            self._set(state, token_id, end)
            state = self._link[state]
        if state >= 0:
            self._link[end] = self._split(state, token_id, found)
        self._count_up(end)

    def _add_state(self, length: int) -> int:
        self._length.append(length)
        self._link.append(0)
        self._count.append(0)
        self._last_end.append(0)
        self._only_token.append(_NONE)
        self._only_next.append(0)
        return len(self._length) - 1

    def _split(self, state: int, token_id: int, found: int) -> int:
        """Split off the state of exactly the string of `state` and the token from the longer strings in `found`."""
        length = self._length[state] + 1
        if self._length[found] == length:
            return found
        clone = self._add_state(length)
        for array_ in (self._link, self._count, self._last_end, self._only_token, self._only_next):
            array_[clone] = array_[found]
        if found in self._branches:
            self._branches[clone] = self._branches[found].copy()
        self._link[found] = clone
        while state >= 0 and self._step(state, token_id) == found:
            self._set(state, token_id, clone)
            state = self._link[state]
        return clone

    def _count_up(self, state: int) -> None:
        """Count one more occurrence of all suffixes of the text."""
        count, last_end, link, position = self._count, self._last_end, self._link, self.num_tokens
        for _ in range(_TUNING.max_counted):
            if state <= 0:
                return
            count[state] += 1
            last_end[state] = position
            state = link[state]

    def _set(self, state: int, token_id: int, target: int) -> None:
        only = self._only_token[state]
        if only in (_NONE, token_id):
            self._only_token[state] = token_id
            self._only_next[state] = target
        elif only == _MANY:
            self._branches[state][token_id] = target
        else:
            self._branches[state] = {only: self._only_next[state], token_id: target}
            self._only_token[state] = _MANY

    def _step(self, state: int, token_id: int) -> int:
        only = self._only_token[state]
        if only == token_id:
            return self._only_next[state]
        return self._branches[state].get(token_id, -1) if only == _MANY else -1

    # -- looking up ---------------------------------------------------------------------------------------------------

    def longest_repeated(self) -> Match:
        """The longest suffix of the text that also ends earlier in it."""
        state = max(0, self._link[self._end])
        return Match(state, self._length[state])

    def advance(self, match: Match, token_id: int) -> Match:
        """The longest context that ends with the matched one and the token; amortised constant time."""
        state, length = self.refresh(match)
        while (found := self._step(state, token_id)) < 0:
            if state == 0:
                return Match(0, 0)
            state = self._link[state]
            length = self._length[state]
        return self.refresh(Match(found, length + 1))

    def refresh(self, match: Match) -> Match:
        """Update a match from before the text grew: its context may now have a state of its own."""
        state, length = match
        while state and length <= self._length[self._link[state]]:
            state = self._link[state]
        return Match(state, length)

    def shorter(self, match: Match) -> Match:
        """The longest suffix of the matched context that occurs more often."""
        state = max(0, self._link[match.state])
        return Match(state, self._length[state])

    def occurrences(self, match: Match) -> int:
        """How often the matched context ends in the text."""
        return self._count[match.state]

    def likeliest(self, state: int) -> Continuation | None:
        """The token that most often followed a context; of several the latest. None if none did or too many did."""
        only = self._only_token[state]
        if only == _NONE:
            return None
        if only != _MANY:
            return Continuation(only, 1.0, self._only_next[state])
        branches = self._branches[state]
        if len(branches) > _TUNING.max_branches:
            return None
        count, last_end = self._count, self._last_end
        best, total = -1, 0
        for child in branches.values():
            total += count[child]
            if best < 0 or (count[child], last_end[child]) > (count[best], last_end[best]):
                best = child
        token_id = next(token_id for token_id, child in branches.items() if child == best)
        return Continuation(token_id, count[best] / total, best)

    def matched(self, token_ids: Iterable[int]) -> Match:
        """The longest suffix of these tokens that occurs in the text."""
        match = Match(0, 0)
        for token_id in token_ids:
            match = self.advance(match, token_id)
        return match
