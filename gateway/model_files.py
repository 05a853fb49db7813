"""Small JSON files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file, {} when the file is absent. Raises ValueError naming the file when it is no object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: is not JSON: {err}") from err
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def read_eos_token_ids(model_dir: Path) -> list[int]:
    """The tokens that end a text: generation_config.json's eos_token_id, else config.json's; one id or a list."""
    for name in ("generation_config.json", "config.json"):
        eos = read_json_object(model_dir / name).get("eos_token_id")
        if eos is not None:
            return list(eos) if isinstance(eos, list) else [eos]
    return []
