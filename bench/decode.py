"""Plain decoding of a 500M-parameter Llama on this CPU, compared with `transformers` on the same weights and threads.

The two sides take turns, so that a drift of the machine's speed affects both. Echelon is measured end to end: client,
gateway, scheduler and worker.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench.load import run_side_by_side
from bench.random_model import write_random_llama
from bench.report import Spread, add_report_options, publish, table
from cluster.deployment.settings import CpuSettings
from cluster.local import LOCAL_SCHEDULER, LocalDeployment, local_settings

PROMPT_LEN = 32


def prompt_ids(index: int) -> list[int]:
    """A different prompt for each seq, so that no prefix is shared."""
    return [1 + (index * 997 + i * 31) % 4000 for i in range(PROMPT_LEN)]


def transformers_side(folder: Path, threads: int, num_tokens: int) -> Callable[[int], float]:
    """Returns a function from batch size to tokens per second of `model.generate`."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def run(batch_size: int) -> float:
        input_ids = torch.tensor([prompt_ids(i) for i in range(batch_size)])
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return batch_size * (output.shape[1] - PROMPT_LEN) / (time.perf_counter() - started)

    return run


def echelon_side(address: str, num_tokens: int) -> Callable[[int], float]:
    """Returns a function from batch size to tokens per second through client, gateway, scheduler and worker."""

    def run(batch_size: int) -> float:
        prompts = [prompt_ids(i) for i in range(batch_size)]
        options = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        return run_side_by_side(address, prompts, options).tokens_per_s

    return run


def measure(runs: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Runs each side once to warm up, then all sides in turn, `runs` times."""
    for side in sides.values():
        side()
    results: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            results[name].append(side())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="paired runs per median")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per seq")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4096)
    add_report_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_parameters = write_random_llama(
            folder, num_layers=args.layers, hidden_size=args.hidden, intermediate_size=args.intermediate
        )
        theirs = transformers_side(folder, args.threads, args.tokens)
        settings = local_settings(
            folder,
            cpu=CpuSettings(threads_per_worker=args.threads),
            scheduler=replace(LOCAL_SCHEDULER, max_num_seqs=8, max_model_len=1024),
        )
        with LocalDeployment(settings, gateway=True) as deployment:
            ours = echelon_side(deployment.running.gateway_address, args.tokens)
            results = measure(
                args.runs,
                {
                    "transformers, batch 1": lambda: theirs(1),
                    "Echelon, batch 1": lambda: ours(1),
                    "transformers, batch 8": lambda: theirs(8),
                    "Echelon, batch 8": lambda: ours(8),
                },
            )
    rows = [[name, f"{Spread.of(values):.1f}"] for name, values in results.items()]
    ratios = [
        ("Echelon / transformers, batch 1", "Echelon, batch 1", "transformers, batch 1"),
        ("Echelon / transformers, batch 8", "Echelon, batch 8", "transformers, batch 8"),
        ("Echelon batch 8 / batch 1", "Echelon, batch 8", "Echelon, batch 1"),
    ]
    for label, above, below in ratios:
        pairs = [a / b for a, b in zip(results[above], results[below], strict=True)]
        rows.append([f"**{label}**", f"{Spread.of(pairs):.2f}"])
    body = (
        f"{num_parameters / 1e6:.0f}M parameters, bf16, {args.threads} threads, greedy, {PROMPT_LEN} prompt tokens, "
        f"{args.tokens} new tokens, prefill included; torch {torch.__version__}. "
        f"Median (least-greatest) of {args.runs} paired runs.\n\n" + table(["", "tokens/s"], rows)
    )
    publish("decode", body, command="python -m bench.decode", save=args.save)


if __name__ == "__main__":
    main()
