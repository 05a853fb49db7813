"""What the files beside tokenizer.json say of special and added tokens, read as `transformers` reads them.

tokenizer_config.json names them (`eos_token`, ...), lists further ones (`additional_special_tokens`,
`extra_special_tokens`) and numbers all (`added_tokens_decoder`). Folders from before that key have
special_tokens_map.json and added_tokens.json instead; a folder that has the key may still hold them, and they count for
nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from checkpoint.errors import LoadError, shown
from checkpoint.json_files import read_optional_json_object

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_STANDARD_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
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
    config = _Object(folder / CONFIG_FILE)
    is_complete = config.get("added_tokens_decoder") is not None
    if is_complete:
        named, file_of, extra = _special_tokens([config])
        numbered = config.numbered_tokens("added_tokens_decoder")
    else:
        named, file_of, extra = _special_tokens([config, _Object(folder / _MAP_FILE)])
        special = {token.content for token in (*named.values(), *extra)}
        numbered = _added_tokens(_Object(folder / _ADDED_FILE), special)
    return SideFiles(
        numbered=numbered,
        is_complete=is_complete,
        named=named,
        file_of=file_of,
        extra=extra,
        splits_special_tokens=config.boolean("split_special_tokens"),
    )


class _Object:
    """The object in a JSON file, empty where there is no file. Errors name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_optional_json_object(path)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def problem(self, key: str, value: object, wants: str) -> LoadError:
        return LoadError(f"{self.path}: {key} is {shown(value)}", f"it must be {wants}: mend it or take it out")

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.problem(key, value, "true or false")
        return bool(value)

    def token(self, key: str, value: object) -> AddedToken:
        """A special token: its text, or an object with flags."""
        wants = "a token: a text, or an object with a text as content and true or false as flags"
        if isinstance(value, str):
            value = {"content": value}
        if not isinstance(value, dict) or not _is_text(value.get("content")):
            raise self.problem(key, value, wants)
        flags = {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self.problem(key, value, wants)
        return AddedToken(value["content"], **flags)

    def special_token(self, key: str, value: object) -> AddedToken:
        if isinstance(value, dict) and self.path.name != _MAP_FILE:
            return self.token(key, {"special": True, **value})
        token = self.token(key, value)
        token.special = True
        return token

    def numbered_tokens(self, key: str) -> dict[int, AddedToken]:
        entries = self.get(key)
        if not isinstance(entries, dict):
            raise self.problem(key, entries, "an object of ids and tokens")
        tokens = {}
        for number, value in entries.items():
            if not number.isdecimal():
                raise self.problem(f"{key}.{number}", value, "under a token id")
            if not isinstance(value, dict):
                raise self.problem(f"{key}.{number}", value, "an object with content and flags")
            tokens[int(number)] = self.token(f"{key}.{number}", value)
        return tokens


def _special_tokens(
    files: Iterable[_Object],
) -> tuple[dict[str, AddedToken], dict[str, str], tuple[AddedToken, ...]]:
    """Named special tokens, the files that name them, and other special tokens; a later file overrides a name and adds
    to the others."""
    named: dict[str, AddedToken] = {}
    file_of: dict[str, str] = {}
    extra: dict[str, AddedToken] = {}
    for file in files:
        own = {name: file.special_token(name, value) for name, value in file.values.items() if _names(name, value)}
        key = next((key for key in _EXTRA_KEYS if file.get(key)), _EXTRA_KEYS[0])
        listed = [] if extra and key != _EXTRA_KEYS[0] else file.get(key) or []
        if not isinstance(listed, list | dict):
            raise file.problem(key, listed, "a list of tokens, or an object of names and tokens")
        if isinstance(listed, list):
            tokens = [file.special_token(f"{key}[{index}]", value) for index, value in enumerate(listed)]
            extra |= {token.content: token for token in tokens}
        else:
            own |= {name: file.special_token(f"{key}.{name}", value) for name, value in listed.items()}
        named |= own
        file_of |= dict.fromkeys(own, file.path.name)
    return dict(sorted(named.items(), key=lambda entry: _rank(entry[0]))), file_of, tuple(extra.values())


def _rank(name: str) -> int:
    """Tokens get their ids in this order."""
    return _STANDARD_NAMES.index(name) if name in _STANDARD_NAMES else len(_STANDARD_NAMES)


def _names(key: str, value: object) -> bool:
    """Whether a key names a special token: one of those that every tokeniser has, or a model's own (image_token)."""
    if key in _STANDARD_NAMES:
        return value is not None
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _added_tokens(file: _Object, special: set[str]) -> dict[int, AddedToken]:
    """Of added_tokens.json: text -> id."""
    tokens = {}
    for text, token_id in file.values.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise file.problem(text, token_id, "a token id")
        tokens[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
    return tokens


def _is_text(value: object) -> bool:
    """JSON can spell half a character, which is no text."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value
