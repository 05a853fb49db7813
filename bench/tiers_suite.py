"""The figures of the tiers that take long, in one command for a machine that has nothing else to do.

    python -m bench.tiers_suite --save

Makes the models that it needs, and measures in this order: first tokens after prefixes of 4,096 and 16,384 tokens with
the 455M pair, 32 conversations of 6 turns whose KV is four times as large as the device, and prompts that never repeat,
both with a target of 95M. About 13 minutes on two cores. The report is printed, and saved, again after each part, so
nothing is lost if it is stopped. A part that fails says why, and the next one begins. What has not begun after
`--minutes` is left out, and named.
"""

import argparse
import contextlib
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.inflate import PRESETS, Size, inflate
from bench.report import add_report_options, hardware, publish
from bench.tiers import MODELS, Bench, Talk, first_tokens, first_tokens_report, talks, talks_report

MAX_LEN = 20480
LENGTHS = (4096, 16384)
TARGET_95M = Size(layers=8, hidden=1152, intermediate=3072, heads=8, kv_heads=4)
# Both of about 300 new tokens a turn. Strangers need fewer turns: nothing of them comes back.
CONVERSATIONS = Talk(conversations=32, turns=6, new_tokens=300, output_tokens=64)
STRANGERS = Talk(conversations=16, turns=3, new_tokens=300, output_tokens=64, repeats=False)
DEVICE_SHARE = 4  # the device holds this part of all KV


@dataclass(frozen=True, slots=True)
class Part:
    title: str
    run: Callable[[], str]  # returns its report


def make_bench(folder: Path, name: str, size: Size, args: argparse.Namespace) -> Bench:
    """The inflated demo pair, with a target of that size. Makes what is not there yet."""
    target, draft = folder / name, folder / "draft-32m"
    for source, out, wanted in (("demo-target", target, size), ("demo-draft", draft, PRESETS["draft-32m"])):
        if not out.exists():
            inflate(MODELS / source, out, wanted, max_len=MAX_LEN)
    return Bench(
        target=target, draft=draft, dtype="bfloat16", device=args.device, threads=args.threads, vocab_size=4096
    )


def make_parts(folder: Path, args: argparse.Namespace) -> list[Part]:
    def prefix(length: int) -> Part:
        def run() -> str:
            bench = make_bench(folder, "target-455m", PRESETS["target-455m"], args)
            return first_tokens_report({length: first_tokens(bench, length, runs=1)})

        return Part(f"First tokens after {length:,}, target of 455M", run)

    def talk(title: str, plan: Talk, runs: int) -> Part:
        def run() -> str:
            bench = make_bench(folder, "target-95m", TARGET_95M, args)
            return talks_report(talks(bench, plan, runs, device_share=DEVICE_SHARE))

        return Part(f"{title}: {plan.conversations} of {plan.turns} turns, target of 95M", run)

    return [
        *map(prefix, LENGTHS),
        talk("Conversations", CONVERSATIONS, 1),
        talk("Strangers", STRANGERS, 3),
    ]


def measure(part: Part) -> str:
    """Its section of the report."""
    began_s = time.monotonic()
    try:
        body = part.run()
    except Exception as err:  # noqa: BLE001  # whatever it is, the other parts can still be measured
        traceback.print_exc()
        body = f"failed: {err}"
    return f"## {part.title}\n\n{body}\n\nTook {time.monotonic() - began_s:.0f} s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=12.0, help="after which no part begins")
    parser.add_argument("--parts", type=int, nargs="*", help="numbers of the parts to measure, from 1; default: all")
    add_report_options(parser)
    args = parser.parse_args()
    deadline_s = time.monotonic() + 60 * args.minutes
    command = shlex.join(["python", "-m", "bench.tiers_suite", *sys.argv[1:]])
    sections: list[str] = []
    with tempfile.TemporaryDirectory(prefix="echelon-tiers-") as folder, contextlib.suppress(KeyboardInterrupt):
        for number, part in enumerate(make_parts(Path(folder), args), start=1):
            if args.parts and number not in args.parts:
                continue
            in_time = time.monotonic() < deadline_s
            sections.append(measure(part) if in_time else f"## {part.title}\n\nLeft out: the time was over.")
            publish("tiers-long", "\n\n".join(sections), command=command, save=args.save, on=hardware(args.device))


if __name__ == "__main__":
    main()
