"""The cases of tests/corpus."""

import json
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parents[1] / "corpus"
TOKENIZERS = {path.name: path for path in sorted((CORPUS / "tokenizers").iterdir())}
PAIRS = {path.stem: path for path in sorted((CORPUS / "pairs").iterdir())}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tokenizers_that(key: str) -> list[str]:
    """Names of the tokenisers whose case has `key`: "texts" or "error"."""
    return [name for name, path in TOKENIZERS.items() if key in read(path / "expected.json")]


def changed(content: Any, case: dict[str, Any]) -> Any:
    """The tokenizer.json of a pair's draft."""
    for path in case["delete"]:
        place, key = _place(content, path)
        del place[key]
    for path, value in case["set"].items():
        place, key = _place(content, path)
        place[key] = value
    return content


def _place(content: Any, path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split(".")
    for parent in parents:
        content = content[parent]
    return content, key
