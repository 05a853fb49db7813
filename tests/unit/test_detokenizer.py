"""Streamed chunks of text join to the text of the whole output, and none holds half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from checkpoint.errors import LoadError
from checkpoint.token_table import TokenTable
from scheduler.requests.detokenizer import Detokenizer
from tests.helpers.tiny_tokenizers import KINDS, SPACE

TOKENIZERS = {kind: build() for kind, build in KINDS.items()}
TABLES = {kind: TokenTable(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
SENTENCEPIECE, SENTENCEPIECE_TABLE = TOKENIZERS["sentencepiece"], TABLES["sentencepiece"]
BYTE_LEVEL, BYTE_TABLE = TOKENIZERS["byte_level"], TABLES["byte_level"]


def pieces(table: TokenTable, token_ids: list[int], *, skip: bool = True, follows_text: bool = False) -> list[str]:
    detokenizer = Detokenizer(table, skip_special_tokens=skip, follows_text=follows_text)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def streamed(table: TokenTable, prompt: list[int], output: list[int], *, skip: bool) -> str:
    """The streamed text of an output after a prompt."""
    follows_text = table.shows(prompt, skip_special_tokens=skip)
    return "".join(pieces(table, output, skip=skip, follows_text=follows_text))


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole(kind: str, data: st.DataObject, skip: bool) -> None:
    """Random tokens, which mostly are not valid UTF-8 when joined."""
    tokenizer, table = TOKENIZERS[kind], TABLES[kind]
    token_ids = data.draw(st.lists(st.integers(0, len(table.bytes_of) - 1), max_size=20))
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    joined = streamed(table, [], token_ids, skip=skip)
    if "\ufffd" in joined and kind != "byte_level":
        # In an invalid run of byte tokens the tokenizer drops the valid characters too; we keep them.
        assert "\ufffd" in whole
    else:
        assert joined == whole


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_output_continues_where_the_prompt_ends(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer, table = TOKENIZERS[kind], TABLES[kind]
    some_ids = st.lists(st.integers(0, len(table.bytes_of) - 1), max_size=5)
    prompt, output = data.draw(some_ids), data.draw(some_ids)
    start, whole = (tokenizer.decode(ids, skip_special_tokens=skip) for ids in (prompt, prompt + output))
    if "\ufffd" not in start + whole:
        assert start + streamed(table, prompt, output, skip=skip) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a <tool>b", "a<tool> b", "a <tool call> b", "a <left>b<right> a", "<|start|> a b"])
def test_added_tokens_keep_the_spaces_around_them(kind: str, text: str) -> None:
    """The name of an added token with "normalized": true holds the space before it."""
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode(text).ids
    assert streamed(TABLES[kind], [], token_ids, skip=True) == tokenizer.decode(token_ids)


def test_a_space_before_a_normalised_token_is_text() -> None:
    token_ids = SENTENCEPIECE.encode("a <tool>b").ids
    assert streamed(SENTENCEPIECE_TABLE, [], token_ids, skip=True) == "a <tool>b"


@given(st.text(alphabet="a\u00e9\u6771\U0001f642\U0001f469 \n", max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text).ids
    parts = pieces(BYTE_TABLE, token_ids)
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == text


@given(st.text(alphabet="a\u00e9\u6771\U0001f642\u00df ", max_size=12))
@settings(max_examples=200, deadline=None)
def test_byte_fallback_text_is_whole(text: str) -> None:
    token_ids = [2 + byte for byte in text.encode()]
    joined = "".join(pieces(SENTENCEPIECE_TABLE, token_ids, follows_text=True))
    assert joined == text


def test_the_first_space_is_dropped_only_where_a_text_starts() -> None:
    hello = SENTENCEPIECE.token_to_id(f"{SPACE}Hello")
    assert "".join(pieces(SENTENCEPIECE_TABLE, [hello, hello])) == "Hello Hello"
    assert "".join(pieces(SENTENCEPIECE_TABLE, [hello, hello], follows_text=True)) == " Hello Hello"


def test_a_special_token_that_is_shown_starts_the_text() -> None:
    bos, hello = SENTENCEPIECE.token_to_id("<s>"), SENTENCEPIECE.token_to_id(f"{SPACE}Hello")
    assert streamed(SENTENCEPIECE_TABLE, [bos], [hello], skip=True) == "Hello"
    assert streamed(SENTENCEPIECE_TABLE, [bos], [hello], skip=False) == " Hello"


def test_a_character_waits_for_its_last_byte() -> None:
    byte_tokens = [2 + byte for byte in "\U0001f642a".encode()]
    assert pieces(SENTENCEPIECE_TABLE, byte_tokens) == ["", "", "", "\U0001f642", "a", ""]
    assert pieces(SENTENCEPIECE_TABLE, byte_tokens[:3]) == ["", "", "", "\ufffd"]


def test_ids_of_a_padded_vocabulary_have_no_text() -> None:
    assert pieces(BYTE_TABLE, [100_000]) == ["", ""]
    assert BYTE_TABLE.text_of(100_000) == ""


def test_special_tokens_are_shown_on_request() -> None:
    end = BYTE_LEVEL.token_to_id("</s>")
    assert "".join(pieces(BYTE_TABLE, [end])) == ""
    assert "".join(pieces(BYTE_TABLE, [end], skip=False)) == "</s>"
    assert BYTE_TABLE.text_of(end) == "</s>"


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.CTC(), "CTC"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Strip(" ", 1, 0), "Strip"),  # applies to each token, since nothing has joined them
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "Replace"),  # across tokens
        (None, "no decoder"),
    ],
)
def test_a_decoder_that_needs_the_whole_text_is_refused_by_name(decoder: object, named: str) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoder
    with pytest.raises(LoadError, match=named):
        TokenTable(tokenizer)
