"""What speculation gains: tokens per second of each variant, compared with plain decoding and `transformers`.

Each run starts a variant's processes, warms them up and sends every prompt. Variants take turns (A B C, A B C, ...), so
that a drift of the machine's speed affects all, and ratios compare runs of the same turn. Outputs are compared token by
token with those of plain decoding. A variant that this build refuses is listed with the reason.

    python -m bench.inflate models/demo-target /tmp/target --preset target-455m
    python -m bench.inflate models/demo-draft /tmp/draft --preset draft-32m
    python -m bench.speculate --target /tmp/target --draft /tmp/draft --threads 2 -k 3 5 --transformers
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.differences import Difference, first_difference, gap_between
from bench.load import run_side_by_side
from bench.plots import plot_bars
from bench.prompts import load_prompts
from bench.report import Spread, add_report_options, hardware, publish, table
from bench.speculate_results import Cell, Prompts, Results, Run, share
from bench.variants import (
    METHODS,
    PIPELINES,
    PLAIN,
    SOURCES,
    NotAvailableError,
    Pair,
    Variant,
    VariantDeployment,
    all_variants,
)
from checkpoint.tokenizer import load_tokenizer
from childproc.wires import open_blocking_channel
from echelon.pb.scheduler_pb2 import GetSchedulerStatusRequest, SchedulerStatus
from echelon.pb.scheduler_pb2_grpc import SchedulerStub
from echelon.requests import GenerateOptions

MODELS = Path(__file__).parents[1] / "models"
SEED = 1
WARM_UP_TOKENS = 32
MOST_GAPS = 16  # differences whose gap is measured


def status_of(deployment: VariantDeployment) -> SchedulerStatus:
    with open_blocking_channel(deployment.running.replicas[0].scheduler_address) as channel:
        return SchedulerStub(channel).GetSchedulerStatus(GetSchedulerStatusRequest(), timeout=10.0)


def run_cell(deployment: VariantDeployment, prompts: Sequence[list[int]], cell: Cell, num_tokens: int) -> Run:
    """One run over all prompts, after a few similar requests with other tokens. Their prompts have the same lengths,
    because how a prompt is computed depends on the lengths of recent ones."""
    address = deployment.running.gateway_address
    options: GenerateOptions = {
        "max_tokens": num_tokens,
        "temperature": cell.temperature,
        "seed": SEED,
        "ignore_eos": True,
    }
    strangers = [
        [1 + (997 * i + 31 * j) % 4000 for j in range(len(prompt))]
        for i, prompt in enumerate(prompts[: cell.concurrency])
    ]
    run_side_by_side(address, strangers, {**options, "max_tokens": WARM_UP_TOKENS})
    before = status_of(deployment)
    timed = run_side_by_side(address, prompts, options, concurrency=cell.concurrency)
    after = status_of(deployment)
    stats = [completion.speculation for completion in timed.completions]
    hits = after.verdict_cache_hits_total - before.verdict_cache_hits_total
    misses = after.verdict_cache_misses_total - before.verdict_cache_misses_total
    return Run(
        tokens_per_s=timed.tokens_per_s,
        token_s=share(
            sum(completion.timings.total_s - completion.timings.first_token_s for completion in timed.completions),
            sum(completion.usage.completion_tokens - 1 for completion in timed.completions),
        ),
        tokens_per_round=share(timed.num_tokens, sum(s.num_rounds for s in stats)),
        acceptance=share(sum(s.num_accepted_tokens for s in stats), sum(s.num_draft_tokens for s in stats)),
        draft_idle=(after.draft_idle_seconds_total - before.draft_idle_seconds_total) / timed.seconds,
        target_idle=(after.verify_wait_seconds_total - before.verify_wait_seconds_total) / timed.seconds,
        drafts_per_draft_round=share(
            after.draft_tokens_total - before.draft_tokens_total, after.draft_rounds_total - before.draft_rounds_total
        ),
        cache_hits=share(hits, hits + misses),
        outputs=[completion.token_ids for completion in timed.completions],
    )


def measure(
    pair: Pair,
    variants: Sequence[Variant],
    prompts: Prompts,
    args: argparse.Namespace,
) -> Results:
    """Runs every variant in turn, `args.runs` times, in each cell that has prompts, and reports each on stderr at once.
    Raises NotAvailableError if plain decoding cannot be started."""
    results = Results()
    for number in range(1, args.runs + 1):
        for variant in variants:
            if variant in results.refusals:
                continue
            try:
                with VariantDeployment(pair, variant) as deployment:
                    for cell in prompts:
                        run = run_cell(deployment, prompts[cell], cell, args.tokens)
                        results.add(variant, cell, run)
                        print(
                            f"run {number}/{args.runs}, {variant.name}, {cell.name}: {run.tokens_per_s:.1f} tokens/s",
                            file=sys.stderr,
                        )
            except NotAvailableError as error:
                if variant == PLAIN:
                    raise
                results.refusals[variant] = str(error)
    return results


def differences(results: Results, cell: Cell, variant: Variant, prompts: Prompts) -> list[Difference]:
    """Of the last run, at most one per prompt."""
    plain, other = (results.runs[cell][v][-1].outputs for v in (PLAIN, variant))
    found = (first_difference(*each) for each in zip(prompts[cell], plain, other, strict=True))
    return [difference for difference in found if difference is not None]


def rows_of(results: Results, cell: Cell, prompts: Prompts, *, forced: bool) -> list[list[str]]:
    rows = []
    for variant, runs in results.runs[cell].items():
        last = runs[-1]
        base = None if variant.pipeline == "serial" else results.best_serial(cell, variant.source)
        rival = None
        if variant != PLAIN and variant.num_drafts is None:
            rival = results.best_without_policy(cell, variant)
        num_differing = len(differences(results, cell, variant, prompts))
        rows.append(
            [
                variant.name,
                f"{Spread.of([run.tokens_per_s for run in runs]):.1f}",
                f"{Spread.of(results.ratios(cell, variant, PLAIN)):.2f}",
                f"{Spread.of(results.ratios(cell, variant, base)):.2f} of {base.short_name}" if base else "",
                f"{Spread.of(results.ratios(cell, variant, rival)):.2f} of {rival.short_name}" if rival else "",
                f"{1e3 * Spread.of([run.token_s for run in runs]).median:.1f}",
                f"{Spread.of(results.decoding_ratios(cell, variant, PLAIN)):.2f}",
                f"{Spread.of(results.decoding_ratios(cell, variant, base)):.2f}" if base else "",
                f"{last.tokens_per_round:.2f}",
                "" if variant == PLAIN else f"{last.acceptance:.2f}",
                f"{last.draft_idle:.0%}" if variant.uses_draft_model else "",
                "" if variant == PLAIN else f"{last.target_idle:.0%}",
                f"{last.drafts_per_draft_round:.1f}" if variant.uses_draft_model else "",
                f"{last.cache_hits:.0%}" if variant.pipeline.endswith("+cache") else "",
                "forced" if forced else f"{num_differing} of {len(prompts[cell])}",
            ]
        )
    return rows


HEADER = [
    "variant",
    "tokens/s",
    "x plain",
    "x best serial",
    "auto x best fixed",
    "ms/token",
    "x plain, decoding",
    "x best serial, decoding",
    "tokens/round",
    "accepted/drafted",
    "draft idle",
    "target idle",
    "drafts/draft round",
    "cache hits",
    "outputs that differ",
]


def gap_report(pair: Pair, results: Results, prompts: Prompts) -> str:
    """The gaps where outputs differ; empty if none do."""
    found = [
        (cell, variant, difference)
        for cell, by_variant in results.runs.items()
        for variant in by_variant
        for difference in differences(results, cell, variant, prompts)
    ]
    if not found:
        return ""
    rows = []
    with VariantDeployment(pair, PLAIN) as deployment:
        for cell, variant, difference in found[:MOST_GAPS]:
            address = deployment.running.gateway_address
            gap = gap_between(address, difference, temperature=cell.temperature, seed=SEED)
            tokens = f"{difference.plain_token_id} / {difference.other_token_id}"
            rows.append([variant.name, cell.name, str(len(difference.output)), tokens, f"{gap:.4f}"])
    header = ["variant", "load", "at output token", "plain / other", "gap between the two"]
    return f"\n\n{len(found)} outputs differ from plain decoding:\n\n" + table(header, rows)


def transformers_rows(args: argparse.Namespace, prompts: Sequence[list[int]]) -> list[list[str]]:
    """Plain and assisted generation, one prompt at a time, greedy."""
    from bench.transformers_generate import TransformersPair  # takes seconds to import, and few runs ask for it

    theirs = TransformersPair(args.target, args.draft, dtype=args.dtype, threads=args.threads)
    chosen = [None, *(k for k in args.k if k is not None)]
    speeds: dict[int | None, list[float]] = {k: [] for k in chosen}
    for _ in range(args.runs):
        for k in chosen:
            speeds[k].append(theirs.tokens_per_s(prompts, num_tokens=args.tokens, num_drafts=k))
    names = {k: "transformers, plain" if k is None else f"transformers, assisted, k = {k}" for k in chosen}
    ratios = {k: [a / b for a, b in zip(speeds[k], speeds[None], strict=True)] for k in chosen}
    return [
        [names[k], f"{Spread.of(speeds[k]):.1f}", f"{Spread.of(ratios[k]):.2f}"] + [""] * (len(HEADER) - 3)
        for k in chosen
    ]


def _count_or_auto(text: str) -> int | None:
    return None if text == "auto" else int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument(
        "--dtype", default="bfloat16", help="float32: outputs must be equal; bfloat16: equal except at ties"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the target")
    parser.add_argument("--placement", choices=["colocated", "separate"], default="colocated")
    parser.add_argument("--threads", type=int, default=2, help="threads of each worker")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graphs", choices=["auto", "off"], default="auto", help="CUDA graphs")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--sources", nargs="+", choices=list(METHODS), default=list(SOURCES))
    parser.add_argument(
        "-k", type=_count_or_auto, nargs="+", default=[3, 5], help="drafts per round; auto: the policy chooses"
    )
    parser.add_argument("--layer-parallel-size", type=int, default=4)
    parser.add_argument("--forced-acceptance", type=float, default=0.0, help="count this share of drafts as right")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--dataset", type=Path, help="JSON lines with `prompt` or `turns`; default: bundled prompts")
    parser.add_argument("--prompts", type=int, default=8, help="number of prompts; at least the concurrency")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=5, help="paired runs per median")
    parser.add_argument("--transformers", action="store_true", help="also transformers, on the same pair and prompts")
    parser.add_argument("--name", default="speculate", help="name of the report")
    add_report_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    tokenizer = load_tokenizer(args.target)
    cells = [Cell(t, c) for t in args.temperatures for c in args.concurrency]
    texts = load_prompts(args.dataset, max(args.prompts, *args.concurrency))
    token_ids = [tokenizer.encode(text).ids for text in texts]
    prompts = {cell: token_ids[: max(args.prompts, cell.concurrency)] for cell in cells}
    pair = Pair(
        target=args.target,
        draft=args.draft,
        dtype=args.dtype,
        tp_size=args.tp,
        colocated=args.placement == "colocated",
        threads=args.threads,
        max_num_seqs=max(args.concurrency),
        lp_size=args.layer_parallel_size,
        forced_acceptance=args.forced_acceptance,
        device=args.device,
        graphs=args.graphs,
    )
    variants = all_variants(args.pipelines, args.sources, args.k)
    results = measure(pair, variants, prompts, args)
    body = _body(args, pair, results, prompts)
    command = shlex.join(["python", "-m", "bench.speculate", *sys.argv[1:]])
    path = publish(args.name, body, command=command, save=args.save, on=hardware(args.device))
    if path is not None:
        bars = {
            cell.name: {v.name: Spread.of([run.tokens_per_s for run in runs]) for v, runs in by_variant.items()}
            for cell, by_variant in results.runs.items()
        }
        plot_bars(bars, label="tokens/s", path=path.with_suffix(".png"))


def _body(args: argparse.Namespace, pair: Pair, results: Results, prompts: Prompts) -> str:
    parts = [
        f"{args.target.name} and {args.draft.name}, {args.dtype}, {args.tp} target rank(s), {args.placement}, "
        f"{args.threads} thread(s) a worker, {args.prompts} prompts (or as many as run at once) x {args.tokens} "
        "tokens, prefill included, no prefix cache"
        + (f", acceptance forced to {args.forced_acceptance:g}" if args.forced_acceptance else "")
        + f". Median (least-greatest) of {args.runs} paired runs."
    ]
    for cell in results.runs:
        rows = rows_of(results, cell, prompts, forced=bool(args.forced_acceptance))
        if args.transformers and cell == Cell(0.0, 1):
            rows += transformers_rows(args, prompts[cell])
        parts.append(f"## {cell.name[0].upper()}{cell.name[1:]}\n\n" + table(HEADER, rows))
    parts += [f"{variant.name}: not available: {error}" for variant, error in results.refusals.items()]
    return "\n\n".join(parts) + ("" if args.forced_acceptance else gap_report(pair, results, prompts))


if __name__ == "__main__":
    main()
