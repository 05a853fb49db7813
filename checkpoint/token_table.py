"""What each token of a tokeniser adds to a text, so that a stream can be decoded token by token.

The tokenisers that models use spell a token as bytes whatever stands around it: byte-level BPE (Llama 3, Qwen),
SentencePiece with byte fallback (Llama 2, Mistral), Metaspace and WordPiece. Only where a text starts do some of them
leave out a space.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from checkpoint.errors import LoadError

Component = Mapping[str, Any]  # a step of tokenizer.json's decoder

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The order in which a decoder's steps can be applied to each token by itself: those that rewrite a token, those that
# make it bytes, those that join the bytes, and those that cut the start of the whole.
_STAGES = {"Replace": 0, "Metaspace": 0, "WordPiece": 0, "ByteFallback": 1, "ByteLevel": 2, "Fuse": 3, "Strip": 4}
_SUPPORTED = "supported are ByteLevel, WordPiece, Metaspace, and Replace, ByteFallback, Fuse and Strip at the start"
# What WordPiece's clean-up replaces, in this order, in each token with the space before it.
_CLEAN_UP = (" .", " ?", " !", " ,", (" ' ", "'"), " n't", " 'm", (" do not", " don't"), " 's", " 've", " 're")


class TokenTable:
    """The bytes of every token of one tokenizer. Shared by all seqs, never changed.

    Raises LoadError where the decoder needs more than one token at a time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._components = _decoder_components(json.loads(tokenizer.to_str())["decoder"])
        vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        # The names in `vocab` are not always those that a decoder sees: an added token with "normalized": true has the
        # spaces of the normaliser there.
        self._tokens: list[str] = [
            tokenizer.id_to_token(token_id) or "" for token_id in range(max(vocab.values(), default=-1) + 1)
        ]
        self.bytes_of: list[bytes] = [_spell(token, self._components) for token in self._tokens]
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        # By name, as the tokenizers library skips them.
        self.special_ids = frozenset(token_id for token_id, token in enumerate(self._tokens) if token in special)
        # How many spaces the decoder removes where a text starts.
        self.num_leading_spaces: int = sum(step["start"] for step in self._components if step["type"] == "Strip")
        # Whether the first token of a text is spelt differently.
        self.has_first_form = any(step["type"] in ("Metaspace", "WordPiece") for step in self._components)

    @property
    def has_start_rule(self) -> bool:
        """Whether tokens decode differently at the start of a text."""
        return self.has_first_form or self.num_leading_spaces > 0

    def text_of(self, token_id: int) -> str:
        """One token alone, as shown with its log-probability."""
        return self._bytes(token_id).decode("utf-8", "replace")

    def first_bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token with which a text starts."""
        return _spell(self._tokens[token_id], self._components, is_first=True)

    def shows(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> bool:
        """Whether any of the tokens is part of a text that leaves special tokens out or not."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        return any(token_id < len(self.bytes_of) and token_id not in hidden for token_id in token_ids)

    def _bytes(self, token_id: int) -> bytes:
        # A padded vocabulary has ids without a tokeniser entry; they have no text.
        return self.bytes_of[token_id] if token_id < len(self.bytes_of) else b""


def _decoder_components(decoder: Component | None) -> list[Component]:
    components = _flat(decoder) if decoder else []
    stage = 0
    for component in components:
        if not _is_supported(component, stage):
            raise LoadError(
                f"tokenizer.json: decoder {json.dumps(component)} cannot be applied token by token",
                f"use a model with another tokeniser; {_SUPPORTED}",
            )
        stage = _STAGES[component["type"]]
    if not components:
        raise LoadError(
            "tokenizer.json has no decoder, so its tokens cannot be turned into text",
            "save the tokeniser again with transformers; a ByteLevel or ByteFallback decoder is usual",
        )
    return components


def _flat(decoder: Component) -> list[Component]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [component for part in decoder["decoders"] for component in _flat(part)]


def _is_supported(component: Component, stage: int) -> bool:
    """Whether it can follow a component of that stage."""
    kind = component["type"]
    if kind not in _STAGES or _STAGES[kind] < stage or (kind == "ByteLevel" and stage == _STAGES["ByteFallback"]):
        return False
    if kind == "Replace":
        return "String" in component["pattern"]
    if kind == "Strip":  # before the tokens are joined it would cut each of them
        return stage >= _STAGES["ByteLevel"] and component["content"] == " " and component["stop"] == 0
    return True


def _spell(token: str, components: Iterable[Component], *, is_first: bool = False) -> bytes:
    for component in components:
        match component["type"]:
            case "Replace":
                token = token.replace(component["pattern"]["String"], component["content"])
            case "Metaspace":
                drops = is_first and component["prepend_scheme"] != "never"
                token = token.replace(component["replacement"], "" if drops else " ")
            case "WordPiece":
                token = _word_piece(token, component, is_first=is_first)
            case "ByteFallback" if byte := _BYTE_TOKEN.fullmatch(token):
                return bytes.fromhex(byte[1])
            case "ByteLevel":
                with contextlib.suppress(UnicodeEncodeError):  # it is an added token, which stands for itself
                    return token.translate(_BYTE_LEVEL).encode("latin-1")
    return token.encode()


def _word_piece(token: str, component: Component, *, is_first: bool) -> str:
    if not is_first:
        prefix = component["prefix"]
        token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
    if component["cleanup"]:
        for entry in _CLEAN_UP:
            old, new = (entry, entry[1:]) if isinstance(entry, str) else entry
            token = token.replace(old, new)
    return token


def _byte_level_alphabet() -> dict[int, int]:
    """Maps each character that byte-level BPE (GPT-2) writes for a byte to that byte. Other characters below 256 map to
    values that are no bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, 256) | {0x100 + index: byte for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
