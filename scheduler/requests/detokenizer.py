"""Token ids to text, a token at a time, never half a character.

Both families of tokenizers that the supported models use spell a token as bytes whatever stands around it: byte-level
BPE (Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Mistral). So a table of bytes and an incremental
UTF-8 decoder give exactly the text of the whole, at a constant cost a token. Bytes that are no UTF-8 become U+FFFD as
soon as no further byte could complete them.
"""

import codecs
import json
import re
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class UnsupportedTokenizerError(ValueError):
    """The tokenizer spells tokens in a way that cannot be decoded token by token."""


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


class TokenTable:
    """The bytes of every token of one tokenizer. Shared by all seqs, never changed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        components = _decoder_components(json.loads(tokenizer.to_str())["decoder"])
        vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.bytes_of: list[bytes] = [b""] * (max(vocab.values()) + 1)
        for token, token_id in vocab.items():
            self.bytes_of[token_id] = _spell(token, components)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # How many spaces the decoder removes where a text starts.
        self.num_leading_spaces = sum(c["start"] for c in components if c["type"] == "Strip")

    def text_of(self, token_id: int) -> str:
        """One token alone, as shown beside its log-probability."""
        return self._bytes(token_id).decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> bytes:
        # A padded vocabulary has ids that no tokenizer entry stands for; they have no text.
        return self.bytes_of[token_id] if token_id < len(self.bytes_of) else b""


class Detokenizer:
    """The text of one seq's output.

    `follows_text` says whether visible text stands before the first token: where a text starts, SentencePiece
    decoders remove the space in front of the first word.
    """

    __slots__ = ("_bytes_of", "_num_spaces_to_drop", "_skipped", "_utf8")

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool, follows_text: bool) -> None:
        self._bytes_of = table.bytes_of
        self._skipped = table.special_ids if skip_special_tokens else frozenset()
        self._utf8 = _new_utf8_decoder("replace")
        self._num_spaces_to_drop = 0 if follows_text else table.num_leading_spaces

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; bytes of an unfinished character wait for the next."""
        if token_id in self._skipped or token_id >= len(self._bytes_of):
            return ""
        text = self._utf8.decode(self._bytes_of[token_id])
        return self._drop_spaces(text) if self._num_spaces_to_drop and text else text

    def flush(self) -> str:
        """The end of the output: an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)

    def _drop_spaces(self, text: str) -> str:
        stripped = text.lstrip(" ")
        num_dropped = min(self._num_spaces_to_drop, len(text) - len(stripped))
        self._num_spaces_to_drop = 0 if stripped else self._num_spaces_to_drop - num_dropped
        return text[num_dropped:]


def _decoder_components(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    components = decoder.get("decoders", [decoder]) if decoder else []
    for component in components:
        if not _is_supported(component):
            raise UnsupportedTokenizerError(
                f"tokenizer.json: decoder {json.dumps(component)} cannot be applied token by token; "
                "supported are ByteLevel, and Replace, ByteFallback, Fuse and Strip at the start"
            )
    if not components:
        raise UnsupportedTokenizerError("tokenizer.json has no decoder; a ByteLevel or ByteFallback decoder is needed")
    return components


def _is_supported(component: dict[str, Any]) -> bool:
    match component["type"]:
        case "ByteLevel" | "ByteFallback" | "Fuse":
            return True
        case "Replace":
            return "String" in component["pattern"]
        case "Strip":
            return bool(component["content"] == " " and component["stop"] == 0)
    return False


def _spell(token: str, components: list[dict[str, Any]]) -> bytes:
    for component in components:
        match component["type"]:
            case "Replace":
                token = token.replace(component["pattern"]["String"], component["content"])
            case "ByteFallback" if byte := _BYTE_TOKEN.fullmatch(token):
                return bytes.fromhex(byte[1])
            case "ByteLevel" if all(c in _ALPHABET for c in token):
                return bytes(_ALPHABET[c] for c in token)
    return token.encode()


_ALPHABET = _byte_level_alphabet()
