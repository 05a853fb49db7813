"""The JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from checkpoint.errors import LoadError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises LoadError naming the file when it is missing or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path.parent} has no {path.name}", "is it a model in Hugging Face layout?") from None
    except ValueError as err:
        raise LoadError(f"{path} is not JSON: {err}", "repair it or copy it again") from err
    except OSError as err:
        raise LoadError(f"{path} cannot be read: {err}", "repair it or copy it again") from err
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds a {type(content).__name__}, not an object", "repair it or copy it again")
    return content


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """The object in a file, {} when the file is absent."""
    return read_json_object(path) if path.is_file() else {}


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's eos_token_id, where chat models list the tokens that end a
    turn, else config.json's; one id or a list."""
    for name in ("generation_config.json", "config.json"):
        eos = read_optional_json_object(folder / name).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (int(eos),)
    return ()
