"""Drafts without a model: what followed the same tokens before, in the seq itself or in finished requests.

SuffixDecoding (arXiv 2411.04975) on suffix automata. Indexing a long prompt at once would stop the event loop for a
moment, so every call indexes a slice of what waits.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.drafting.suffix_automaton import SEPARATOR, Match, SuffixAutomaton


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Bounds of the cost of lookup and of what it proposes."""

    max_prompt: int = 32_768  # only the last so many tokens of a prompt are indexed; not measured
    prompt_slice: int = 1024  # tokens of prompts, of all seqs, indexed per round: some milliseconds; not measured
    min_slice: int = 64  # tokens of each prompt indexed at a time, however many prompts wait; not measured
    request_slice: int = 4  # of finished requests, indexed per committed token: faster than they arrive; not measured
    max_context: int = 64  # latest tokens that are matched against finished requests; not measured
    max_contexts: int = 6  # contexts of different lengths that are tried; not measured
    min_probability: float = 0.1  # of a draft and all before it, or no more drafts follow; not measured
    max_indexed: int = 500_000  # tokens of finished requests that are searched: at most 75 MB; not measured


_TUNING = Tuning()


class Proposal(NamedTuple):
    """Drafts, and how reliable they are by the counts of what followed."""

    token_ids: list[int]
    probabilities: list[float]  # of each draft together with all before it
    match_len: int  # tokens of the context that they followed before

    @property
    def score(self) -> float:
        """Expected accepted tokens."""
        return sum(self.probabilities)


def prefers_lookup(proposal: Proposal, *, reliability: float, expected_by_model: float) -> bool:
    """Whether the proposal promises more accepted tokens than the draft model.

    `reliability`: how often drafts from lookup were accepted (`Acceptance.rate` of an estimate of their own), which the
    counts do not show. `expected_by_model`: accepted tokens, without the target's own one.
    """
    trusted = (share * reliability**depth for depth, share in enumerate(proposal.probabilities, start=1))
    return sum(trusted) > expected_by_model


class SuffixIndex:
    """Finished requests of all seqs: at most the latest `max_tokens`, and at least half of them once there were so
    many.

    There are two automata. When the younger one is full it becomes the older one, which is forgotten. A token takes
    about 150 bytes (`SuffixAutomaton`). One per scheduler.
    """

    def __init__(self, max_tokens: int = _TUNING.max_indexed) -> None:
        self._half = max(2, max_tokens // 2)
        self._queue: deque[array[int]] = deque()  # not yet indexed
        self._num_queued = 0
        self._done = 0  # tokens of the first one that are indexed
        self.automata = (SuffixAutomaton(), SuffixAutomaton())  # younger, older
        self.num_waiting_prompts = 0

    @property
    def num_tokens(self) -> int:
        """Including those that wait to be indexed."""
        return self._num_queued + sum(automaton.num_tokens for automaton in self.automata)

    def add(self, token_ids: Sequence[int]) -> None:
        """Add the output of a finished request (and its prompt, if others are likely to repeat it)."""
        if not token_ids:
            return
        self._queue.append(array("i", [*token_ids[-self._half + 1 :], SEPARATOR]))
        self._num_queued += len(self._queue[-1])
        while self._num_queued > self._half:
            self._num_queued -= len(self._queue.popleft()) - self._done
            self._done = 0

    def index(self, max_tokens: int) -> None:
        """Index this many of the tokens that wait."""
        while max_tokens > 0 and self._queue:
            text = self._queue[0]
            part = text[self._done : self._done + max_tokens]
            if self.automata[0].num_tokens + len(part) > self._half:
                self.automata = (SuffixAutomaton(), self.automata[0])
            self.automata[0].extend(part)
            max_tokens -= len(part)
            self._done += len(part)
            self._num_queued -= len(part)
            if self._done == len(text):
                self._queue.popleft()
                self._done = 0


class _Pointer:
    """Where the latest tokens of a seq are in an automaton of finished requests."""

    __slots__ = ("_num_tokens", "automaton", "match")

    def __init__(self, automaton: SuffixAutomaton, recent: Sequence[int]) -> None:
        self.automaton = automaton
        self.match = automaton.matched(recent)
        self._num_tokens = automaton.num_tokens

    @property
    def is_stale(self) -> bool:
        """The automaton has grown, so it may now hold a longer context."""
        return self._num_tokens != self.automaton.num_tokens

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self.match = self.automaton.advance(self.match, token_id)


class SuffixDrafts:
    """Drafts for one seq. Call `close` when the seq ends."""

    def __init__(self, shared: SuffixIndex, prompt_token_ids: Sequence[int]) -> None:
        self._shared = shared
        self._local = SuffixAutomaton()
        self._waiting = array("i", prompt_token_ids[-_TUNING.max_prompt :])  # not yet indexed, if any
        self.num_indexed = 0  # tokens of the prompt
        self._recent: deque[int] = deque(prompt_token_ids[-_TUNING.max_context :], maxlen=_TUNING.max_context)
        self._pointers: list[_Pointer] = []
        shared.num_waiting_prompts += 1

    @property
    def is_indexed(self) -> bool:
        """Whether the seq's own text is already searched."""
        return not self._waiting

    def close(self) -> None:
        """The seq has ended."""
        if self._waiting:
            self._waiting = array("i")
            self._shared.num_waiting_prompts -= 1

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add committed tokens. Also indexes a little of finished requests."""
        self._recent.extend(token_ids)
        for pointer in self._pointers:
            pointer.advance(token_ids)
        if self._waiting:
            self._waiting.extend(token_ids)
        else:
            self._local.extend(token_ids)
        self._shared.index(_TUNING.request_slice * len(token_ids))

    def index(self) -> None:
        """Index a slice of the prompt; the more prompts wait, the shorter the slice. `propose` does it too."""
        if not self._waiting:
            return
        size = max(_TUNING.min_slice, _TUNING.prompt_slice // self._shared.num_waiting_prompts)
        self._local.extend(self._waiting[self.num_indexed : self.num_indexed + size])
        self.num_indexed += size
        if self.num_indexed >= len(self._waiting):
            self.close()  # nothing waits any longer

    def propose(self, max_tokens: int) -> Proposal:
        """At most `max_tokens` drafts after the tokens so far. On a tie the seq's own text beats finished requests."""
        self.index()
        best = Proposal([], [], 0)
        if self.is_indexed:
            best = _best_continuation(self._local, self._local.longest_repeated(), max_tokens)
        for pointer in self._fresh_pointers():
            other = _best_continuation(pointer.automaton, pointer.match, max_tokens)
            if other.score > best.score:
                best = other
        return best

    def _fresh_pointers(self) -> list[_Pointer]:
        known = {id(pointer.automaton): pointer for pointer in self._pointers if not pointer.is_stale}
        self._pointers = [
            known.get(id(automaton)) or _Pointer(automaton, self._recent)
            for automaton in self._shared.automata
            if automaton.num_tokens
        ]
        return self._pointers


def _best_continuation(automaton: SuffixAutomaton, match: Match, max_tokens: int) -> Proposal:
    """The continuation with the best score, of contexts of several lengths. On a tie the longer context wins."""
    best = Proposal([], [], 0)
    for _ in range(_TUNING.max_contexts):
        if match.length == 0:
            break
        # A context of n tokens is trusted for n drafts.
        proposal = _continuation(automaton, match, min(max_tokens, match.length))
        if proposal.score > best.score:
            best = proposal
        if best.score >= min(max_tokens, match.length):
            break  # shorter contexts cannot do better
        match = automaton.shorter(match)
    return best


def _continuation(automaton: SuffixAutomaton, match: Match, max_tokens: int) -> Proposal:
    token_ids: list[int] = []
    probabilities: list[float] = []
    state, probability = match.state, 1.0
    while len(token_ids) < max_tokens:
        following = automaton.likeliest(state)
        if following is None or following.token_id == SEPARATOR:
            break
        probability *= following.probability
        if probability < _TUNING.min_probability:
            break
        token_ids.append(following.token_id)
        probabilities.append(probability)
        state = following.state
    return Proposal(token_ids, probabilities, match.length)
