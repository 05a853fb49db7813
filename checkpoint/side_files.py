"""What the files next to tokenizer.json say about special and added tokens, read as `transformers` reads them.

tokenizer_config.json names them (`eos_token`, ...), lists further ones (`additional_special_tokens`,
`extra_special_tokens`) and numbers all (`added_tokens_decoder`). Folders from before that key have
special_tokens_map.json and added_tokens.json instead; a folder that has the key may still hold them, and they count for
nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken

from checkpoint.fields import Fields
from checkpoint.json_files import read_optional_json_object

_CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_STANDARD_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NUMBERED_KEY = "added_tokens_decoder"
_ID = re.compile(r"[0-9]{1,9}")
_EXTRA_KEYS = ("extra_special_tokens", "additional_special_tokens")  # the new name and the old one


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    numbered: Mapping[int, AddedToken]  # by the id that the file gives
    is_complete: bool  # `numbered` also says how the tokens of tokenizer.json are treated
    named: Mapping[str, AddedToken]  # "eos_token" -> the token
    file_of: Mapping[str, str]  # "eos_token" -> the name of the file that says so
    extra: tuple[AddedToken, ...]  # special tokens without a name
    splits_special_tokens: bool  # in a text, special tokens are no more than their characters


def read_side_files(folder: Path) -> SideFiles:
    """Raises LoadError naming file, key and value."""
    config, special_map, added = (
        Fields(name, read_optional_json_object(folder / name)) for name in (_CONFIG_FILE, _MAP_FILE, _ADDED_FILE)
    )
    is_complete = config.get(_NUMBERED_KEY) is not None
    named, file_of, extra = _special_tokens([config] if is_complete else [config, special_map])
    special = {token.content for token in (*named.values(), *extra)}
    return SideFiles(
        numbered=_numbered_tokens(config) if is_complete else _added_tokens(added, special),
        is_complete=is_complete,
        named=named,
        file_of=file_of,
        extra=extra,
        splits_special_tokens=config.flag("split_special_tokens"),
    )


def _special_tokens(
    files: Iterable[Fields],
) -> tuple[dict[str, AddedToken], dict[str, str], tuple[AddedToken, ...]]:
    """Named special tokens, the files that name them, and other special tokens; a later file overrides a name and adds
    to the others."""
    named: dict[str, AddedToken] = {}
    file_of: dict[str, str] = {}
    extra: dict[str, AddedToken] = {}
    for file in files:
        own = {name: _special_token(file, name, value) for name, value in file.items() if _names(name, value)}
        key = next((key for key in _EXTRA_KEYS if file.get(key)), _EXTRA_KEYS[0])
        listed = [] if extra and key != _EXTRA_KEYS[0] else file.get(key) or []
        if not isinstance(listed, list | dict):
            raise file.wrong(key, "a list of tokens, or an object of names and tokens")
        if isinstance(listed, list):
            tokens = [_special_token(file, f"{key}[{index}]", value) for index, value in enumerate(listed)]
            extra |= {token.content: token for token in tokens}
        else:
            own |= {name: _special_token(file, f"{key}.{name}", value) for name, value in listed.items()}
        named |= own
        file_of |= dict.fromkeys(own, file.file)
    return dict(sorted(named.items(), key=lambda entry: _rank(entry[0]))), file_of, tuple(extra.values())


def _rank(name: str) -> int:
    """Tokens get their ids in this order."""
    return _STANDARD_NAMES.index(name) if name in _STANDARD_NAMES else len(_STANDARD_NAMES)


def _names(key: str, value: object) -> bool:
    """Whether a key names a special token: one of those that every tokeniser has, or a model's own (image_token)."""
    if key in _STANDARD_NAMES:
        return value is not None
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _special_token(file: Fields, place: str, value: object) -> AddedToken:
    token = _token(file, place, value)
    # The older file has no such flag, and a token that is written as a text has none.
    token.special = file.file == _MAP_FILE or not isinstance(value, dict) or value.get("special") is not False
    return token


def _token(file: Fields, place: str, value: object) -> AddedToken:
    """A token is written as its text, or as an object with flags."""
    entry = {"content": value} if isinstance(value, str) else value
    if isinstance(entry, dict) and _is_text(entry.get("content")):
        flags = {flag: entry[flag] for flag in _FLAGS if entry.get(flag) is not None}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(entry["content"], **flags)
    raise file.wrong_entry(place, value, "a token: a text, or an object with a text as content and flags")


def _numbered_tokens(file: Fields) -> dict[int, AddedToken]:
    tokens = {}
    for number, value in file.part(_NUMBERED_KEY).items():
        place = f"{_NUMBERED_KEY}.{number}"
        if not _ID.fullmatch(number) or not isinstance(value, dict):
            raise file.wrong_entry(place, value, "an object with content and flags, under a token id")
        tokens[int(number)] = _token(file, place, value)
    return tokens


def _added_tokens(file: Fields, special: set[str]) -> dict[int, AddedToken]:
    """Of added_tokens.json: text -> id."""
    tokens = {}
    for text, token_id in file.items():
        if not _is_text(text) or not isinstance(token_id, int) or not _ID.fullmatch(str(token_id)):
            raise file.wrong_entry(text, token_id, "a token id, under the token's text")
        tokens[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
    return tokens


def _is_text(value: object) -> bool:
    """JSON can spell half a character, which is not text."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value
