"""Whether two folders share a tokeniser."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.json_files import read_json_object


def compare_tokenizers(target: Path, draft: Path) -> str | None:
    """Why the two folders do not share a tokeniser, naming the first token that differs; None if they do.

    Only what changes the ids of a text counts. Rows of the embedding beyond the last token are padding and may differ.
    """
    first, second = read_json_object(target / "tokenizer.json"), read_json_object(draft / "tokenizer.json")
    if first == second:
        return None
    tokens, draft_tokens = _tokens_by_id(first), _tokens_by_id(second)
    for token_id in sorted(tokens.keys() | draft_tokens.keys()):
        ours, theirs = tokens.get(token_id), draft_tokens.get(token_id)
        if ours != theirs:
            return f"token {token_id} is {_quoted(ours)} in the target and {_quoted(theirs)} in the draft"
    for part in ("normalizer", "pre_tokenizer", "model"):
        if first.get(part) != second.get(part):
            return f"the tokens are equal, but tokenizer.json differs in {part!r}, so texts may split differently"
    return None


def _quoted(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _tokens_by_id(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        tokens = {token_id: str(entry[0]) for token_id, entry in enumerate(vocabulary)}
    else:
        tokens = {token_id: token for token, token_id in vocabulary.items()}
    tokens |= {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", [])}
    return tokens
