"""Whether a draft can write for a target.

The two exchange token ids alone: the draft reads the ids of a stream and proposes others, and the target decides. So an
id must mean the same to both. Everything else costs acceptance at most, never the output: how a tokeniser splits a
text (the target's does it for both), tokens that one has and the other has not, and special tokens by other names.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from checkpoint.errors import LoadError
from checkpoint.token_table import TokenTable

_SPLITTING = ("normalizer", "pre_tokenizer", "model")  # the parts of tokenizer.json that split a text
_HARMLESS = "the output is the same, but drafts may be accepted less often"
_IDLE_WHERE_EMPTY = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    problem: str | None  # why the two are no pair
    notes: tuple[str, ...]  # what differs and costs acceptance at most


def compare_tokenizers(target: Tokenizer, draft: Tokenizer) -> PairReport:
    """The problem names the first token that differs."""
    ours, theirs = _texts(target), _texts(draft)
    both = ours.keys() & theirs.keys()
    differing = _of_other_meaning(
        sorted(token_id for token_id in both if ours[token_id] != theirs[token_id]), target, draft
    )
    added = target.get_added_tokens_decoder().keys() | draft.get_added_tokens_decoder().keys()
    wrong = [token_id for token_id in differing if token_id not in added]
    if wrong:
        problem = f"{_difference(wrong[0], ours, theirs)}, {len(wrong)} of {len(both - added)} common ids differ"
        return PairReport(problem=problem, notes=())
    if both <= added:
        return PairReport(problem="they have no id in common", notes=())
    notes = [_token_note(differing, ours, theirs), _splitting_note(target, draft)]
    return PairReport(problem=None, notes=tuple(filter(None, notes)))


def tokens_from(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """The tokens for which a model with that many has no embedding, by id."""
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    beyond = sorted((token_id, token) for token, token_id in vocab.items() if token_id >= vocab_size)
    return [token for _, token in beyond]


def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return {token_id: text for text, token_id in vocab.items()}


def _of_other_meaning(differing: Sequence[int], target: Tokenizer, draft: Tokenizer) -> list[int]:
    """Those ids of `differing` names that are also of different bytes: "<0x41>" is an A, and so is "A"."""
    if not differing:
        return []
    try:
        ours, theirs = TokenTable(target).bytes_of, TokenTable(draft).bytes_of
    except LoadError:  # a draft decodes nothing, so its decoder may be of any sort
        return list(differing)
    return [token_id for token_id in differing if ours[token_id] != theirs[token_id]]


def _token_note(renamed: Sequence[int], ours: Mapping[int, str], theirs: Mapping[int, str]) -> str:
    counts = {
        "of other names": len(renamed),
        "in the target alone": len(ours.keys() - theirs.keys()),
        "in the draft alone": len(theirs.keys() - ours.keys()),
    }
    if not any(counts.values()):
        return ""
    first = min([*renamed, *(ours.keys() ^ theirs.keys())])
    listed = ", ".join(f"{count} {where}" for where, count in counts.items() if count)
    return f"target and draft have different tokens ({listed}): {_difference(first, ours, theirs)}; {_HARMLESS}"


def _difference(token_id: int, ours: Mapping[int, str], theirs: Mapping[int, str]) -> str:
    mine, other = (_quoted(tokens.get(token_id)) for tokens in (ours, theirs))
    return f"token {token_id} is {mine} in the target and {other} in the draft"


def _quoted(text: str | None) -> str:
    return "missing" if text is None else repr(text)


def _splitting_note(target: Tokenizer, draft: Tokenizer) -> str:
    ours, theirs = json.loads(target.to_str()), json.loads(draft.to_str())
    _keep_common_scores(ours["model"], theirs["model"])
    parts = [part for part in _SPLITTING if _canonical(ours[part]) != _canonical(theirs[part])]
    if not parts:
        return ""
    return f"target and draft split texts differently ({', '.join(parts)} of tokenizer.json): {_HARMLESS}"


def _keep_common_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Which tokens exist does not decide how texts split; which are preferred does (Unigram: [token, score])."""
    vocabularies = [model.pop("vocab") for model in (ours, theirs)]
    if all(isinstance(vocabulary, list) for vocabulary in vocabularies):
        first, second = (dict(vocabulary) for vocabulary in vocabularies)
        ours["scores"] = {token: score for token, score in first.items() if token in second}
        theirs["scores"] = {token: score for token, score in second.items() if token in first}


def _canonical(value: Any) -> Any:
    """The same for parts that do the same: beyond the spelling that the tokenizers library settles itself, a sequence
    of one is its only step, offsets do not matter, and some settings are idle where they are empty."""
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Sequence":
        steps = list(_steps(value))
        return _canonical(steps[0]) if len(steps) == 1 else [_canonical(step) for step in steps] or None
    idle = {key for key in _IDLE_WHERE_EMPTY if not value.get(key)} | {"trim_offsets"}
    return {key: _canonical(entry) for key, entry in value.items() if key not in idle}


def _steps(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if part.get("type") != "Sequence":
        yield part
        return
    for step in part.get("normalizers") or part.get("pretokenizers") or ():
        yield from _steps(step)
