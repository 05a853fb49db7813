"""What speculation gives: the demo pair with and without its draft, on the same ranks, greedy and at temperature 1.

Each prompt runs alone, one after another (the single-stream case), with and without drafts in turn. The outputs are
compared token by token: speculation must not change them.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.load import run_side_by_side
from bench.prompts import load_prompts
from bench.report import Spread, add_report_options, publish, table
from cluster.local import LocalDeployment, local_settings
from echelon.requests import GenerateOptions
from echelon.results import Completion

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One setting over all prompts and runs."""

    speedups: list[float]  # one for each run over all prompts
    tokens_per_step: float  # committed tokens for each target step of a request
    accepted: float  # accepted / drafted
    num_differing: int  # prompts whose tokens differ


def compare(address: str, prompts: list[str], options: GenerateOptions, num_draft_tokens: int, runs: int) -> Comparison:
    """Runs every prompt with and without drafts, `runs` times in turn, behind one run to warm up."""
    plain_options: GenerateOptions = {**options, "speculation": {"enabled": False}}
    draft_options: GenerateOptions = {**options, "speculation": {"num_speculative_tokens": num_draft_tokens}}

    def run(chosen: GenerateOptions) -> tuple[float, list[Completion]]:
        timed = [run_side_by_side(address, [prompt], chosen) for prompt in prompts]
        return sum(t.seconds for t in timed), [completion for t in timed for completion in t.completions]

    run(plain_options), run(draft_options)
    speedups = []
    for _ in range(runs):
        plain_s, plain = run(plain_options)
        drafted_s, drafted = run(draft_options)
        speedups.append(plain_s / drafted_s)
    stats = [completion.speculation for completion in drafted]
    return Comparison(
        speedups=speedups,
        tokens_per_step=sum(c.usage.completion_tokens for c in drafted) / sum(s.num_rounds for s in stats),
        accepted=sum(s.num_accepted_tokens for s in stats) / max(1, sum(s.num_draft_tokens for s in stats)),
        num_differing=sum(a.token_ids != b.token_ids for a, b in zip(plain, drafted, strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the target")
    parser.add_argument("--dtype", default="float32", help="float32: outputs must be equal; bfloat16: but for ties")
    parser.add_argument("--dataset", type=Path, help="JSON lines with `prompt` or `turns`; default: bundled prompts")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-k", type=int, nargs="+", default=[2, 4, 6], help="drafts a round")
    add_report_options(parser)
    args = parser.parse_args()
    prompts = load_prompts(args.dataset, args.prompts)
    settings = local_settings(
        args.target,
        draft=args.draft,
        tp_size=args.tp,
        dtype=args.dtype,
        num_speculative_tokens=max(args.k),
        max_num_seqs=8,
    )
    rows = []
    with LocalDeployment(settings, gateway=True) as deployment:
        for temperature in (0.0, 1.0):
            options: GenerateOptions = {
                "max_tokens": args.tokens,
                "temperature": temperature,
                "seed": 1,
                "ignore_eos": True,
            }
            for k in args.k:
                result = compare(deployment.running.gateway_address, prompts, options, k, args.runs)
                rows.append(
                    [
                        f"{temperature:g}",
                        str(k),
                        f"{result.tokens_per_step:.2f}",
                        f"{result.accepted:.2f}",
                        f"{Spread.of(result.speedups):.2f}",
                        f"{result.num_differing} of {len(prompts)}",
                    ]
                )
    body = (
        f"{args.target.name} on {args.tp} rank(s), {args.draft.name} on 1, {args.dtype}, one thread a rank, one "
        f"request at a time, {len(prompts)} prompts x {args.tokens} tokens; "
        f"median (least-greatest) of {args.runs} paired runs.\n\n"
        + table(["temperature", "k", "tokens/target step", "accepted/drafted", "speed-up", "outputs that differ"], rows)
    )
    publish(
        f"speculate-tp{args.tp}",
        body,
        command=shlex.join(["python", "-m", "bench.speculate", *sys.argv[1:]]),
        save=args.save,
    )


if __name__ == "__main__":
    main()
