"""Hundreds of damaged model folders and deployment files that the plan accepts: each is really started and used.

    python -m tests.property.mutated_ups --count 200 --seed 1

prints what became of each: served, or refused by `up` with a message that a person may judge. A fault is a traceback, a
start or a request that fails or hangs, and a process that is left behind. Models have one rank, unless a change gives
them more. Every tenth deployment starts a Ray of its own.
"""

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.helpers.folder_oracle import Kind, Outcome
from tests.helpers.real_ups import Lane
from tests.property.mutated_folders import Case, Folders, run_case

_OWN_RAY_EVERY = 10


class Tally:
    """Counts and prints; from several threads. It is over after `wanted` deployments or `limit_s`."""

    def __init__(self, wanted: int, limit_s: float) -> None:
        self.kinds: Counter[str] = Counter()
        self._wanted = wanted
        self._began_s = time.monotonic()
        self._limit_s = limit_s
        self._lock = threading.Lock()

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._began_s

    def is_over(self) -> bool:
        return self.kinds.total() >= self._wanted or self.took_s > self._limit_s

    def add(self, case: Case, outcome: Outcome) -> None:
        with self._lock:
            self.kinds[outcome.kind] += 1
            print(f"case {case.number}: {outcome.kind}: {'; '.join(case.changes)}\n  {outcome.text}", flush=True)


def _deploy_all(numbers: Iterator[int], seed: int, root: Path, tally: Tally) -> None:
    root.mkdir()
    folders = Folders(root / "valid")
    with Lane(root) as lane:
        while not tally.is_over():
            number = next(numbers)
            case = run_case(number, seed, folders, root / "case", one_rank=True)
            if case.outcome.kind is Kind.FAULT:
                tally.add(case, case.outcome)
            elif case.outcome.kind is Kind.SERVED and case.changes:
                file = root / "case" / "deployment.yaml"
                tally.add(case, lane.deploy(file, own_ray=number % _OWN_RAY_EVERY == 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="deployments")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no other one after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="deployments at a time, each with a Ray of its own")
    arguments = parser.parse_args()
    tally = Tally(arguments.count, arguments.seconds)
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.jobs) as lanes:
        running = [
            lanes.submit(_deploy_all, numbers, arguments.seed, Path(root) / str(lane), tally)
            for lane in range(arguments.jobs)
        ]
        for lane in running:
            lane.result()
    figures = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kinds.items()))
    print(f"{tally.kinds.total()} deployments of seed {arguments.seed} in {tally.took_s:.0f} s: {figures}")
    sys.exit(bool(tally.kinds[Kind.FAULT]))


if __name__ == "__main__":
    main()
