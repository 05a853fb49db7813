"""Echelon beside vLLM's CPU build and `transformers`: the same models, prompts, tokens and threads, in turn.

A turn of a load runs every side once, on the same prompts, each after a short warm-up; the next turn runs them in the
opposite order. Ratios compare runs of one turn. Measurements go into a journal, and a call with the same journal
continues it, so a comparison can be made in pieces.

    python -m bench.inflate models/demo-target /tmp/target --preset target-455m
    python -m bench.inflate models/demo-draft /tmp/draft --preset draft-32m
    python -m bench.peers --target /tmp/target --draft /tmp/draft --vllm-python /tmp/vllm/bin/python --save

docs/benchmarks.md says how to install vLLM. Without it, Echelon and `transformers` are measured.
"""

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.peers.journal import Journal, JournalError
from bench.peers.machine import OtherWork
from bench.peers.results import Measurement, Results, Side, tokens_per_s
from bench.peers.sides import PeerError, RunningSide, Setup, start_side
from bench.peers.tables import load_table, metric_curves, ratio_table
from bench.peers.turns import Schedule, Turn
from bench.plots import plot_curves
from bench.prompts import load_prompts
from bench.report import add_report_options, hardware, publish
from bench.variants import NotAvailableError, Pair
from checkpoint.tokenizer import load_tokenizer

MODELS = Path(__file__).parents[2] / "models"
SYSTEMS = ("Echelon", "vLLM", "transformers")
NUM_PROMPTS = 96
MAX_NUM_SEQS = 32  # of every side, whichever loads a call chooses
RATIOS = (
    "Ratios compare runs of one turn: the median and the interval that holds it with 95 % confidence; in square "
    "brackets the least and the greatest where there are fewer than 6 pairs. More tokens/s and less time are better."
)


class Sides(contextlib.ExitStack):
    """Started when they are first needed, since each takes a while and memory; closed together."""

    def __init__(self, setup: Setup, journal: Journal) -> None:
        super().__init__()
        self._setup = setup
        self._journal = journal
        self._running: dict[Side, RunningSide] = {}

    def get(self, side: Side) -> RunningSide:
        if side not in self._running:
            print(f"starting {side.name}", file=sys.stderr)
            running = start_side(self._setup, side)
            self.callback(running.close)
            self._journal.introduce(side, running.about)
            self._running[side] = running
        return self._running[side]


def measure(schedule: Schedule, turn: Turn, side: Side, running: RunningSide) -> Measurement:
    running.run(schedule.warm_up(turn))
    others = OtherWork()
    run = running.run(schedule.task(turn))
    return Measurement(load=turn.load, turn=turn.number, side=side, run=run, other_cores=others.cores())


def run_missing(schedule: Schedule, journal: Journal, setup: Setup, args: argparse.Namespace) -> None:
    """Until nothing is missing or the time is up."""
    ends = time.monotonic() + 60 * args.minutes
    missing = list(schedule.missing(journal.results.quiet(args.quiet)))
    with Sides(setup, journal) as sides:
        for turn in missing:
            if time.monotonic() > ends:
                break
            for side in schedule.sides(turn):
                measurement = measure(schedule, turn, side, sides.get(side))
                journal.add(measurement)
                speed = f"{tokens_per_s(measurement.run):.1f} tokens/s"
                print(f"turn {turn.number + 1}, {turn.load} at once, {side.name}: {speed}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--dtype", default="bfloat16", help="float32: outputs must be equal; bfloat16: but for ties")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side; default: all cores")
    parser.add_argument("-k", type=int, default=5, help="drafts per round where the number is fixed")
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="requests at once")
    parser.add_argument("--dataset", type=Path, help="JSON lines with `prompt` or `turns`; default: bundled prompts")
    parser.add_argument("--prompts", type=int, default=4, help="least prompts of a run; more where more run at once")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=15, help="turns of each load")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--quiet", type=float, metavar="CORES", help="do not count turns in which others used more")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further turn after this time")
    parser.add_argument("--journal", type=Path, default=Path(tempfile.gettempdir()) / "bench-peers.jsonl")
    add_report_options(parser)
    args = parser.parse_args()
    if args.vllm_python is None:
        args.systems = [system for system in args.systems if system != "vLLM"]
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a journal share."""
    return {
        "target": args.target.name,
        "draft": args.draft.name,
        "dtype": args.dtype,
        "threads": args.threads,
        "k": args.k,
        "dataset": args.dataset.name if args.dataset else "bundled prompts",
        "prompts": args.prompts,
        "tokens": args.tokens,
        "hardware": hardware(),
    }


def setup_of(args: argparse.Namespace) -> Setup:
    pair = Pair(
        target=args.target,
        draft=args.draft,
        dtype=args.dtype,
        tp_size=1,
        colocated=True,
        threads=args.threads,
        max_num_seqs=max(MAX_NUM_SEQS, *args.loads),
        lp_size=1,
        forced_acceptance=0.0,
    )
    return Setup(pair=pair, num_drafts=args.k, vllm_python=args.vllm_python)


def schedule_of(args: argparse.Namespace) -> Schedule:
    tokenizer = load_tokenizer(args.target)
    return Schedule(
        systems=args.systems,
        loads=args.loads,
        num_turns=args.pairs,
        least_prompts=args.prompts,
        num_tokens=args.tokens,
        pool=[tokenizer.encode(text).ids for text in load_prompts(args.dataset, NUM_PROMPTS)],
    )


def body_of(args: argparse.Namespace, journal: Journal, results: Results) -> str:
    left_out = journal.results.num_turns - results.num_turns
    peers = [system for system in SYSTEMS[1:] if system in results.systems]
    parts = [
        f"{args.target.name} and {args.draft.name}, {args.dtype}, {args.threads} thread(s) for every side, greedy, "
        f"{args.tokens} tokens a request, prefill included, no prefix cache; at least {args.prompts} prompts a run "
        f"({args.dataset.name if args.dataset else 'bundled'}), others in each turn. fixed: {args.k} drafts a round. "
        "All sides stay loaded and run in turn, each after a warm-up.",
        "\n".join(f"- {name}: {about}" for name, about in sorted(journal.about.items())),
        RATIOS
        + (f" {left_out} turns in which others used more than {args.quiet} cores are left out." if left_out else ""),
        *(ratio_table(results, peer) for peer in peers),
        *([] if "vLLM" in peers else ["vLLM was not measured: it needs --vllm-python (docs/benchmarks.md)."]),
        *(f"## {load} at once\n\n" + load_table(results, load) for load in results.loads),
    ]
    return "\n\n".join(parts)


def main() -> None:
    args = parse_arguments()
    try:
        journal = Journal(args.journal, settings_of(args))
        run_missing(schedule_of(args), journal, setup_of(args), args)
    except (JournalError, NotAvailableError, PeerError) as error:
        sys.exit(str(error))
    results = journal.results.quiet(args.quiet)
    command = shlex.join(["python", "-m", "bench.peers", *sys.argv[1:]])
    path = publish("peers", body_of(args, journal, results), command=command, save=args.save)
    if path is not None:
        plot_curves(metric_curves(results), label="requests at once", path=path.with_suffix(".png"))


if __name__ == "__main__":
    main()
