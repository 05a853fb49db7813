"""Thousands of damaged model folders and deployment files: each is either served or refused with a message.

    python -m tests.property.mutated_folders --count 10000 --seed 1

counts the outcomes, and prints every fault with the number that repeats it (`--only`). A fault is a traceback of the
plan, a message without file or remedy, or a deployment that the plan accepts and a process then cannot load.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from tests.helpers.folder_mutations import mutate_deployment, mutate_folder
from tests.helpers.folder_oracle import Kind, Outcome, outcome_of
from tests.helpers.valid_folders import CONFIGS, write_valid_folder

_DRAFTS: list[dict[str, object] | None] = [
    None,
    {"model": "draft"},
    {"model": "draft", "placement": "colocated"},
    {"model": "draft", "layer_parallel_size": 2, "layer_groups": [[0], [1]], "layer_parallel_mlp": "replicated"},
]
_WEIGHTS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Case:
    number: int
    changes: tuple[str, ...]
    outcome: Outcome


class Folders:
    """Valid folders, made on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def copy(self, family: str, weights: str, num_shards: int, to: Path) -> None:
        made = self._root / f"{family}-{weights}-{num_shards}"
        if not made.exists():
            write_valid_folder(made, family, weights=weights, num_shards=num_shards)
        shutil.copytree(made, to)


def run_case(number: int, seed: int, folders: Folders, scratch: Path, *, one_rank: bool = False) -> Case:
    """One deployment with 1 to 3 changes; the same arguments give the same case. `one_rank`: before the changes, a
    model has no more."""
    rng = random.Random(f"{seed}/{number}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    file = _write_valid(rng, folders, scratch, one_rank)
    changes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        folder = scratch / rng.choice(("target", "target", "draft"))
        if rng.random() < 0.25:
            changes.append(mutate_deployment(file, rng) if file.is_file() else "nothing")
        elif folder.is_dir():
            changes.append(f"{folder.name}/{mutate_folder(folder, rng)}")
    return Case(number, tuple(changes), outcome_of(file))


def _write_valid(rng: random.Random, folders: Folders, scratch: Path, one_rank: bool) -> Path:
    draft = rng.choice(_DRAFTS[:3] if one_rank else _DRAFTS)
    for role in ("target", "draft"):
        if role == "target" or draft is not None:
            family, weights = rng.choice(sorted(CONFIGS)), rng.choice(_WEIGHTS)
            folders.copy(family, weights, rng.choice((1, 1, 3)), scratch / role)
    (scratch / "loop").symlink_to("loop")
    content: dict[str, object] = {
        "apiVersion": "echelon/v1",
        "kind": "Deployment",
        "name": "a",
        "target": {"model": "target", "tensor_parallel_size": 1 if one_rank else rng.choice((1, 1, 2))},
        "draft": draft,
        "device": "cpu",
        "kv_cache": {"device_bytes": "8MiB"},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
    }
    file = scratch / "deployment.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def _run_in_pool(task: tuple[int, int, Path]) -> Case:
    """Each process of the pool has folders of its own."""
    number, seed, root = task
    torch.set_num_threads(1)
    own = root / str(os.getpid())
    case = run_case(number, seed, Folders(own / "valid"), own / "case")
    return replace(case, outcome=replace(case.outcome, settings=None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one a core")
    parser.add_argument("--only", type=int, help="the number of one case, to see what comes of it")
    arguments = parser.parse_args()
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    began_s = time.monotonic()
    kinds: Counter[str] = Counter()
    spawn = multiprocessing.get_context("spawn")  # torch has threads, which do not survive a fork
    with tempfile.TemporaryDirectory() as root, spawn.Pool(arguments.jobs) as pool:
        tasks = [(number, arguments.seed, Path(root)) for number in numbers]
        for done, case in enumerate(pool.imap_unordered(_run_in_pool, tasks, chunksize=10), start=1):
            kinds[case.outcome.kind] += 1
            if case.outcome.kind is Kind.FAULT or arguments.only is not None:
                print(f"case {case.number}: {case.outcome.kind}: {'; '.join(case.changes)}\n{case.outcome.text}\n")
            if done % 1000 == 0 or done == len(tasks):
                figures = ", ".join(f"{kinds[kind]} {kind}" for kind in Kind)
                took_s = time.monotonic() - began_s
                print(f"{done} cases of seed {arguments.seed} in {took_s:.0f} s: {figures}", flush=True)
    sys.exit(bool(kinds[Kind.FAULT]))


if __name__ == "__main__":
    main()
