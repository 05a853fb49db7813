"""Text and chats to token ids, as `transformers.AutoTokenizer` does it."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from checkpoint.chat_template import ChatTemplate, load_chat_template
from checkpoint.eos import read_eos_tokens
from checkpoint.tokenizer import load_tokenizer

INLINE_CHARS = 4096  # below this, tokenising (about 1 us a character) costs less than a thread switch is worth


class PromptTokenizer:
    """Tokeniser and chat template of one model folder. Raises LoadError where they cannot be used."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._tokenizer: Tokenizer = load_tokenizer(model_dir)
        self.chat_template: ChatTemplate | None = load_chat_template(model_dir)

    def eos_token_ids(self, vocab_size: int) -> list[int]:
        """The tokens that end a text of a model with `vocab_size` tokens."""
        return [token.token_id for token in read_eos_tokens(self._model_dir, self._tokenizer, vocab_size)]

    async def encode_text(self, text: str) -> list[int]:
        """Plain text: the tokenizer's post-processor adds the tokens (BOS ...) that it adds for any text."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """A conversation: the template writes BOS itself where the model wants one, so none is added again.

        Raises ChatError; the model must have a template."""
        assert self.chat_template is not None, "the caller checks that there is a template"
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        return await self._encode(text, add_special_tokens=False)

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self._encode_now(text, add_special_tokens)
        return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return token_ids
