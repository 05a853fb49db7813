"""Text to token ids, as `transformers.AutoTokenizer` does it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from checkpoint.chat_template import ChatTemplate, load_chat_template
from checkpoint.eos import read_eos_tokens
from checkpoint.tokenizer import load_tokenizer

_PIECE_CHARS = 1 << 16  # some 50 ms and 20 MiB
# Some models take a long word as one unknown token and a short one, as a cut makes it, by characters; not measured.
_EXTRA_TOKENS_BY_WORD = 128
_PLAUSIBLE_CHARS_PER_TOKEN = 8  # of a text as a whole; a text of blanks may have more


class TooLongError(ValueError):
    """A text has more tokens than are allowed, `num_tokens` at least."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the text has at least {num_tokens} tokens")
        self.num_tokens = num_tokens


class PromptTokenizer:
    """Tokeniser and chat template of one model folder. Raises LoadError where they cannot be used."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._tokenizer: Tokenizer = load_tokenizer(model_dir)
        # A cut falls within a token of this length at most. Twice that, for what a cut changes further on.
        longest = max(map(len, self._tokenizer.get_vocab()), default=0)
        self._extra_tokens_by_cut = 2 * longest + _EXTRA_TOKENS_BY_WORD
        self.chat_template: ChatTemplate | None = load_chat_template(model_dir)

    def eos_token_ids(self, vocab_size: int) -> list[int]:
        """The tokens that end a text of a model with `vocab_size` tokens."""
        return [token.token_id for token in read_eos_tokens(self._model_dir, self._tokenizer, vocab_size)]

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int) -> list[int]:
        """With `add_special_tokens`, the post-processor adds the tokens (BOS ...) that it adds for any text.

        Raises TooLongError, at the latest when it would take memory for many more tokens than `max_tokens`; a result
        may still have a few more."""
        if len(text) > max(_PIECE_CHARS, _PLAUSIBLE_CHARS_PER_TOKEN * max_tokens):
            self._refuse_too_long(text, max_tokens)
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return token_ids

    def special_id(self, text: str) -> int | None:
        """The special token that is written so."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        if token_id is None:
            return None
        added: AddedToken | None = self._tokenizer.get_added_tokens_decoder().get(token_id)
        return token_id if added is not None and added.special else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, special tokens included."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _refuse_too_long(self, text: str, max_tokens: int) -> None:
        """Counts piece by piece and stops early. A text has nearly as many tokens as its pieces together."""
        at_least = 0
        for piece in _pieces(text):
            num_tokens = len(self._tokenizer.encode(piece, add_special_tokens=False).ids)
            at_least += max(0, num_tokens - self._extra_tokens_by_cut)
            if at_least > max_tokens:
                raise TooLongError(at_least)


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE_CHARS):
        yield text[start : start + _PIECE_CHARS]
