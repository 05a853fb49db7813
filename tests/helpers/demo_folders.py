"""Copies of the demo model's folder, without weights and with another chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo-target"


def make_folder(path: Path, *, config: dict[str, Any] | None = None, jinja: str | None = None) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, path)
    stored = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**stored, **(config or {})}))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return path
