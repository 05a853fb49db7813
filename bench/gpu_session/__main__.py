"""Everything that a GPU owes this project, most telling first, within a budget of time.

    pip install -r bench/gpu_requirements.txt
    python -m bench.gpu_session /tmp/session --budget 540

Each step is a process of its own with a time limit. Its log, the results so far and a summary with the first error of
each failure are written after every step, so a session that is cut off keeps what it has. Reports of the benchmarks go
to bench/results, and models that steps make to FOLDER/models. The exit status is 1 if a step failed or ran out of time,
and 2 if the machine lacks something.
"""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from bench.gpu_session.needs import has_cuda, is_installed, missing
from bench.gpu_session.running import SUMMARY, Outcome, run_steps
from bench.gpu_session.steps import gpu_steps


def parse_arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for logs, results and models")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all steps together")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="names of steps; * stands for any")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    if args.budget <= 0:
        parser.error(f"--budget: {args.budget:g}, must be above 0 seconds")
    unknown = [pattern for pattern in args.only if not any(fnmatch(name, pattern) for name in names)]
    if unknown:
        parser.error(f"--only: no step is named {unknown[0]!r}; steps: {', '.join(names)}")
    return args


def report(outcome: Outcome) -> None:
    print(f"{outcome.status:9} {outcome.seconds:5.0f} s  {outcome.name}  {outcome.error}", flush=True)


def main() -> int:
    names = [step.name for step in gpu_steps(Path())]
    args = parse_arguments(names)
    steps = gpu_steps(args.folder / "models")
    steps = [step for step in steps if any(fnmatch(step.name, pattern) for pattern in args.only)]
    if args.list:
        for step in steps:
            print(f"{step.name} (at most {step.limit_s:.0f} s): {' '.join(step.command)}")
        return 0
    if lacks := missing(is_installed, has_cuda):
        for lack in lacks:
            print(f"bench.gpu_session: {lack}", file=sys.stderr)
        return 2
    outcomes = run_steps(steps, args.folder, budget_s=args.budget, on_outcome=report)
    print(f"\n{args.folder / SUMMARY}")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
