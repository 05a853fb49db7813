"""Chunks of text joined together are the text of the whole, and never hold half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from scheduler.requests.detokenizer import Detokenizer, TokenTable, UnsupportedTokenizerError

TEXT = [
    "na\u00efve caf\u00e9, \u6771\u4eac\u3067 \U0001f642\U0001f643 \u2014 ok?",
    "def f(x):\n    return x  # \u00fcn\u00efc\u00f6d\u00e9 \u00bd \u20ac",
    "\U0001f1e9\U0001f1ea \U0001f469\u200d\U0001f469\u200d\U0001f467 flags and families",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """What Llama 2 and Mistral have: words with a visible space, bytes for what has no token."""
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581Hello",
        "\u2581wor",
        "ld",
        "\u00e9",
        "\u6771",
        "\u2581\u2581\u2581",
        "a",
    ]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece_like()
BYTE_TABLE, SENTENCEPIECE_TABLE = TokenTable(BYTE_LEVEL), TokenTable(SENTENCEPIECE)


def pieces(table: TokenTable, token_ids: list[int], *, skip: bool = True, follows_text: bool = False) -> list[str]:
    detokenizer = Detokenizer(table, skip_special_tokens=skip, follows_text=follows_text)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30), st.booleans())
@settings(max_examples=400, deadline=None)
def test_byte_level_pieces_join_to_the_whole(token_ids: list[int], skip: bool) -> None:
    """Any tokens, most of which are no valid UTF-8 together."""
    whole = BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(BYTE_TABLE, token_ids, skip=skip)) == whole


@given(st.text(alphabet="a\u00e9\u6771\U0001f642\U0001f469 \n", max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text).ids
    parts = pieces(BYTE_TABLE, token_ids)
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == text


@given(st.lists(st.integers(0, SENTENCEPIECE.get_vocab_size() - 1), max_size=20).map(tuple), st.booleans())
@settings(max_examples=400, deadline=None)
def test_sentencepiece_pieces_join_to_the_whole(token_ids: tuple[int, ...], skip: bool) -> None:
    whole = SENTENCEPIECE.decode(list(token_ids), skip_special_tokens=skip)
    joined = "".join(pieces(SENTENCEPIECE_TABLE, list(token_ids), skip=skip))
    if "\ufffd" in joined:
        # In an invalid run of byte tokens the tokenizer gives up the valid characters too; we do not.
        assert "\ufffd" in whole
    else:
        assert joined == whole


@given(st.text(alphabet="a\u00e9\u6771\U0001f642\u00df ", max_size=12))
@settings(max_examples=200, deadline=None)
def test_byte_fallback_text_is_whole(text: str) -> None:
    token_ids = [2 + byte for byte in text.encode()]
    joined = "".join(pieces(SENTENCEPIECE_TABLE, token_ids, follows_text=True))
    assert joined == text


def test_the_first_space_is_dropped_only_where_a_text_starts() -> None:
    hello = SENTENCEPIECE.token_to_id("\u2581Hello")
    assert "".join(pieces(SENTENCEPIECE_TABLE, [hello, hello])) == "Hello Hello"
    assert "".join(pieces(SENTENCEPIECE_TABLE, [hello, hello], follows_text=True)) == " Hello Hello"


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


def test_a_decoder_that_needs_the_whole_text_is_refused_by_name() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedTokenizerError, match="WordPiece"):
        TokenTable(tokenizer)
