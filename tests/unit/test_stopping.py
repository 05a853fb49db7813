"""Where an output ends and which text it has, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.pb.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from scheduler.requests.detokenizer import Detokenizer
from scheduler.requests.stopping import Finish, OutputText, StopRules, StopScan, StopStrings
from tests.helpers.scheduler_sim import token_table

TABLE = token_table()


def ids(text: str) -> list[int]:
    return [ord(c) - ord("a") for c in text]


def output(*, stop: tuple[str, ...] = (), **rules: object) -> OutputText:
    defaults = {
        "stop_token_ids": frozenset(),
        "final_token_ids": frozenset(),
        "include_stop_str": False,
        "min_tokens": 0,
        "max_tokens": 100,
    }
    return OutputText(
        StopRules(strings=StopStrings(stop), **defaults | rules),  # type: ignore[arg-type]
        Detokenizer(TABLE, skip_special_tokens=True, follows_text=True),
    )


def feed(out: OutputText, text: str) -> tuple[list[str], Finish | None]:
    """The pieces of text as they become certain, and the end if there is one."""
    pieces = []
    for token_id in ids(text):
        finish = out.push(token_id)
        pieces.append(out.take_text())
        if finish is not None:
            return pieces, finish
    return pieces, None


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    pieces, finish = feed(output(stop=("cde",)), "abcdxcde")
    assert pieces == ["a", "b", "", "", "cdx", "", "", ""]
    assert finish == Finish(reason=FINISH_REASON_STOP, stop_str="cde")


def test_a_stop_string_is_kept_on_request() -> None:
    pieces, _ = feed(output(stop=("cd",), include_stop_str=True), "abcd")
    assert "".join(pieces) == "abcd"


def test_text_held_back_is_delivered_at_the_end() -> None:
    pieces, finish = feed(output(stop=("cde",), max_tokens=4), "abcd")
    assert "".join(pieces) == "abcd"
    assert finish == Finish(reason=FINISH_REASON_LENGTH)


def test_the_stop_string_that_ends_first_wins_and_of_those_the_longest() -> None:
    pieces, finish = feed(output(stop=("bcde", "cd", "bcd")), "abcde")
    assert "".join(pieces) == "a"
    assert finish is not None
    assert finish.stop_str == "bcd"


def test_an_overlapping_start_is_found() -> None:
    pieces, finish = feed(output(stop=("aab",)), "caaab")
    assert finish is not None
    assert "".join(pieces) == "ca"


def test_text_of_the_first_min_tokens_is_no_stop_string() -> None:
    pieces, finish = feed(output(stop=("bc",), min_tokens=3), "abcabc")
    assert finish is not None
    assert "".join(pieces) == "abca"
    # The first character belongs to the first three tokens, so the stop string does not count.
    assert feed(output(stop=("cd",), min_tokens=3), "abcde")[1] is None


def test_a_stop_token_counts_but_has_no_text() -> None:
    out = output(stop_token_ids=frozenset(ids("c")), min_tokens=2)
    pieces, finish = feed(out, "cabc")
    assert finish == Finish(reason=FINISH_REASON_STOP, stop_token_id=ids("c")[0])
    assert "".join(pieces) == "cab"
    assert out.num_tokens == 4


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    assert feed(output(stop_token_ids=frozenset(ids("c")), max_tokens=3), "abc")[1] == Finish(
        reason=FINISH_REASON_STOP, stop_token_id=2
    )


def first_end(text: str, stops: list[str]) -> tuple[int, str] | None:
    """A slow reference: where the first stop string ends, and the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@given(
    st.lists(st.text(alphabet="ab\u00e9", max_size=3), max_size=12),
    st.lists(st.text(alphabet="ab\u00e9", max_size=4), max_size=3),
)
@settings(max_examples=600, deadline=None)
def test_any_division_into_pieces_finds_the_same_end(pieces: list[str], stops: list[str]) -> None:
    scan, emitted, found = StopScan(StopStrings(stops)), "", None
    for piece in pieces:
        text, found = scan.push(piece)
        emitted += text
        if found is not None:
            break
    whole = "".join(pieces)
    expected = first_end(whole, stops)
    if expected is None:
        assert found is None
        assert emitted + scan.flush() == whole
    else:
        end, stop = expected
        assert found == stop
        assert emitted == whole[: end - len(stop)]


@given(st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    scan = StopScan(StopStrings(stops))
    emitted, found = scan.push(text)
    if found is None:
        held = text[len(emitted) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("stops", [(), ("",), ("", "")])
def test_empty_stop_strings_stop_nothing(stops: tuple[str, ...]) -> None:
    pieces, finish = feed(output(stop=stops), "abc")
    assert (pieces, finish) == (["a", "b", "c"], None)
