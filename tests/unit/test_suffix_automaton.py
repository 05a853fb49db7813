"""The suffix automaton, compared with a plain search of the text."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.drafting.suffix_automaton import Match, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 2), max_size=60)


def ends_of(text: list[int], context: list[int]) -> list[int]:
    """The position after each occurrence."""
    size = len(context)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == context]


def longest_suffix_in(text: list[int], tokens: list[int], *, before_end: bool = False) -> list[int]:
    for size in range(len(tokens), 0, -1):
        ends = ends_of(text, tokens[-size:])
        if [end for end in ends if end < len(text)] if before_end else ends:
            return tokens[-size:]
    return []


def built(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    return automaton


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_longest_suffix_that_occurred_before_at_every_length(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for end in range(1, len(text) + 1):
        automaton.extend(text[end - 1 : end])
        expected = longest_suffix_in(text[:end], text[:end], before_end=True)
        assert automaton.longest_repeated().length == len(expected)


@given(TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_a_match_follows_another_text(text: list[int], other: list[int]) -> None:
    automaton = built(text)
    match = Match(0, 0)
    for end in range(1, len(other) + 1):
        match = automaton.advance(match, other[end - 1])
        expected = longest_suffix_in(text, other[:end])
        assert match.length == len(expected)
        if expected:
            assert automaton.occurrences(match) == len(ends_of(text, expected))


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_a_match_survives_growth(text: list[int], later: list[int], other: list[int]) -> None:
    automaton = built(text)
    match = automaton.matched(other)
    automaton.extend(later)
    match = automaton.refresh(match)
    if match.length:
        assert automaton.occurrences(match) == len(ends_of(text + later, other[-match.length :]))


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_likeliest_continuation_is_the_most_frequent_and_then_the_latest(text: list[int]) -> None:
    automaton = built(text)
    match = automaton.longest_repeated()
    while match.length:
        context = text[-match.length :]
        followers = [(text[end], end) for end in ends_of(text, context) if end < len(text)]
        counts = Counter(token_id for token_id, _ in followers)
        latest = dict(followers)
        best = max(counts, key=lambda token_id: (counts[token_id], latest[token_id]))
        found = automaton.likeliest(match.state)
        assert found is not None
        assert found.token_id == best
        assert found.probability == pytest.approx(counts[best] / len(followers))
        match = automaton.shorter(match)


def test_memory_stays_linear_in_the_worst_texts() -> None:
    random = Random(1)
    for text in ([7] * 5000, [1, 2] * 2500, [random.randrange(3) for _ in range(5000)]):
        assert built(text).num_states <= 2 * len(text)


def test_a_context_followed_by_anything_predicts_nothing() -> None:
    text = [token for follower in range(1, 200) for token in (0, follower)]
    automaton = built(text)
    assert automaton.likeliest(automaton.matched([0]).state) is None
