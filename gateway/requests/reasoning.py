"""Whether a model's reasoning comes before its answer."""

from collections.abc import Sequence

from checkpoint.chat_template import ChatTemplate
from echelon.pb.reading_pb2 import REASONING_BEGUN, REASONING_POSSIBLE, REASONING_UNSPECIFIED, Reasoning
from gateway.requests.tokenization import PromptTokenizer

_LAST_WORDS = 16  # tokens; more than "<think>" and the space after it can have


def reasoning_of(template: ChatTemplate | None) -> Reasoning.ValueType:
    """In conversations through the template."""
    thinks = template is not None and template.mentions("</think>")
    return REASONING_POSSIBLE if thinks else REASONING_UNSPECIFIED


def reasoning_after(prompt: Sequence[int], tokenizer: PromptTokenizer) -> Reasoning.ValueType:
    """The same for one conversation, whose last words may have begun it."""
    reasoning = reasoning_of(tokenizer.chat_template)
    return REASONING_BEGUN if reasoning and _last_words(prompt, tokenizer).endswith("<think>") else reasoning


def reasoning_before_a_form(prompt: Sequence[int], tokenizer: PromptTokenizer) -> Reasoning.ValueType:
    """The same, but where the last words have ended it, the model shall not think again."""
    reasoning = reasoning_after(prompt, tokenizer)
    is_over = reasoning and _last_words(prompt, tokenizer).endswith("</think>")
    return REASONING_UNSPECIFIED if is_over else reasoning


def _last_words(prompt: Sequence[int], tokenizer: PromptTokenizer) -> str:
    return tokenizer.decode(prompt[-_LAST_WORDS:]).rstrip()
