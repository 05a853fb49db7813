"""Prompts to measure on: a few of our own (prompts.jsonl), or any JSON-lines file with `prompt` or `turns`."""

import itertools
import json
from pathlib import Path

BUNDLED = Path(__file__).with_name("prompts.jsonl")


def load_prompts(dataset: Path | None, count: int) -> list[str]:
    """The first `count` prompts of a dataset, repeated if it has fewer.

    Raises ValueError for an empty dataset and for a line without `prompt` or `turns`.
    """
    path = dataset or BUNDLED
    prompts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        if "prompt" not in record and "turns" not in record:
            raise ValueError(f"{path}:{number}: needs a field 'prompt' or 'turns', found {sorted(record)}")
        prompts.append(record["prompt"] if "prompt" in record else record["turns"][0])
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return list(itertools.islice(itertools.cycle(prompts), count))
