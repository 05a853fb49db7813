"""A model's tokens in the form in which llguidance compiles grammars for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from checkpoint.errors import LoadError
from checkpoint.token_table import TokenTable
from checkpoint.tokenizer import load_tokenizer

_MARK = "\x02"  # text before a text, so that the tokeniser does not treat it as the start of one


class _Tokens:
    """What `LLTokenizer` asks of a tokeniser. Bytes are those of the texts that clients get; special tokens have none.

    Where a grammar leaves one text alone, llguidance lets only that text's own tokens be chosen: those of `__call__`.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = load_tokenizer(folder)
        table = TokenTable(self._tokenizer)
        no_text = [b""] * (vocab_size - len(table.bytes_of))
        self.tokens = [*table.bytes_of[:vocab_size], *no_text]
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = sorted({*eos_token_ids, *(i for i in table.special_ids if i < vocab_size)})
        self._mark = self._encode(_MARK) if table.has_start_rule else []
        hidden = frozenset(self.special_token_ids)
        self._of_bytes = {text: i for i, text in enumerate(self.tokens) if text and i not in hidden}
        self._longest = max(map(len, self._of_bytes), default=1)
        if not all(bytes([byte]) in self._of_bytes for byte in range(256)):
            raise LoadError(
                f"the tokeniser of {folder} has no token for some bytes, so it cannot write every text that a grammar "
                "allows",
                "leave structured output out",
            )

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        token_ids = self._own(data.decode("utf-8", "replace"))
        return token_ids if b"".join(self.tokens[i] for i in token_ids) == data else self._greedy(data)

    def _own(self, text: str) -> list[int]:
        if not self._mark:
            return self._encode(text)
        token_ids = self._encode(_MARK + text)
        return token_ids[len(self._mark) :] if token_ids[: len(self._mark)] == self._mark else []

    def _encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in token_ids if i < len(self.tokens)]

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token at each place, for a text that the tokeniser writes in another way."""
        token_ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next(end for end in ends if data[start:end] in self._of_bytes)
            token_ids.append(self._of_bytes[data[start:end]])
            start = end
        return token_ids


def load_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Takes a second for 128k tokens. Raises LoadError."""
    tokens: Any = _Tokens(folder, vocab_size, eos_token_ids)
    return LLTokenizer(tokens, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def compile_grammar(vocabulary: LLTokenizer, source: str) -> LLMatcher:
    """Raises ValueError where it cannot be compiled, or takes too much."""
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher
