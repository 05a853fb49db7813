"""The JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from checkpoint.errors import LoadError

_REMEDY = "repair it or copy it again"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises LoadError naming the file when it is missing or holds no object."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise LoadError(f"{path} is not JSON: {err}", _REMEDY) from err
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds a {type(content).__name__}, not an object", _REMEDY)
    return content


def read_text(path: Path) -> str:
    """What a file of text holds. Raises LoadError."""
    refuse_special_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoadError(f"{path.parent} has no {path.name}", "is it a model in Hugging Face layout?") from None
    except OSError as err:
        raise LoadError(f"{path} cannot be read: {err.strerror}", _REMEDY) from err
    except UnicodeDecodeError as err:
        raise LoadError(f"{path} is not UTF-8: {err.reason} at byte {err.start}", _REMEDY) from err


def refuse_special_file(path: Path) -> None:
    """Raises LoadError for a pipe or a device: it may give no byte, or bytes for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise LoadError(f"{path} is a pipe or a device, not a file", _REMEDY)


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """The object in a file, {} when the file is absent."""
    return read_json_object(path) if path.exists() else {}
