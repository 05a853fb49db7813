"""The tokeniser of a model folder: tokenizer.json and what the files next to it add, the same for all callers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from checkpoint.errors import LoadError, shown
from checkpoint.json_files import read_json_object
from checkpoint.side_files import SideFiles, read_side_files

TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENS = 1 << 24  # a table of more would be a mistake
_REMEDY = "copy the file again, or save the tokeniser again with transformers"
_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `transformers` makes of the folder: a text has the same ids. Truncation and padding, which some folders keep
    from training, are off.

    Raises LoadError naming the file, the key and the value that cannot be used.
    """
    side_files = read_side_files(folder)
    tokenizer = _read(folder / TOKENIZER_FILE)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_tokens(list(_tokens_to_add(tokenizer, side_files)))
    tokenizer.encode_special_tokens = side_files.splits_special_tokens
    return tokenizer


def _read(path: Path) -> Tokenizer:
    if not path.is_file():
        raise LoadError(f"{path} is missing", "save the tokeniser in the fast format into the folder")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as err:
        raise _unreadable(path, err) from err
    token, last_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
    if last_id < 0:
        raise LoadError(f"{path}: model.vocab is empty", _REMEDY)
    if last_id >= _MAX_TOKENS:
        raise LoadError(f"{path}: token {shown(token)} has id {last_id}, ids must be below {_MAX_TOKENS}", _REMEDY)
    return tokenizer


def _unreadable(path: Path, error: Exception) -> LoadError:
    """Names the key that cannot be read, where it is one alone."""
    content = read_json_object(path)
    if "model" not in content:
        return LoadError(f"{path}: model is missing", _REMEDY)
    key = next((key for key in _EMPTY if key in content and not _is_readable({**_EMPTY, key: content[key]})), None)
    if key is None:
        return LoadError(f"{path} is not a tokeniser file: {error}", _REMEDY)
    value = content[key]
    if key == "added_tokens" and isinstance(value, list):
        bad = (i for i, token in enumerate(value) if not _is_readable({**_EMPTY, key: [token]}))
        index = next(bad, None)
        key, value = (key, value) if index is None else (f"{key}[{index}]", value[index])
    return LoadError(f"{path}: {key} is {shown(value)}, of which no tokeniser can be made", _REMEDY)


def _is_readable(content: dict[str, Any]) -> bool:
    try:
        Tokenizer.from_str(json.dumps(content))
    except Exception:  # noqa: BLE001 (the library raises nothing more precise)
        return False
    return True


def _tokens_to_add(tokenizer: Tokenizer, side_files: SideFiles) -> Iterator[AddedToken]:
    """Those that the side files have beyond tokenizer.json, and those of it that they treat otherwise.

    New ones get ids in this order, whatever the files say.
    """
    own: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    numbered = side_files.numbered if side_files.is_complete else {**side_files.numbered, **own}
    special_texts = {token.content for token in side_files.named.values()}
    known = {token.content for token in own.values()}
    for _, token in sorted(numbered.items()):
        known.add(token.content)
        token.special = token.special or token.content in special_texts
        yield token
    for token in (*side_files.named.values(), *side_files.extra):
        if token.content not in known:
            token.special = token.special or token.content in special_texts
            yield token
