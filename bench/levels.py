"""What drafters cost and gain in CPU time, with drafts of drafts among them.

Target and draft run in this process and take turns on real prompts, without scheduler and wires, as `pipeline: serial`
does with a fixed number of drafts. CPU time counts, because it means something on a busy machine too. Variants take
turns on each prompt, so that ratios compare the same moment.

    python -m bench.levels --target /tmp/target --draft /tmp/draft --forced-acceptances 0 0.7 0.8 0.9

With a forced acceptance, the output is not the model's: what a lookup finds in it is then no evidence either. The draft
keeps what it keeps of a level beneath it in any case.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.prompts import load_prompts
from bench.report import Spread, add_report_options, hardware, publish, table
from bench.speculate_results import share
from bench.steps import BLOCK_SIZE, GREEDY, MAX_LEN, load
from checkpoint.tokenizer import load_tokenizer
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, Round, Row, RowResult, SeqInit
from workers.engine.chain_lookup import ChainLookup
from workers.engine.draft_engine import DraftEngine
from workers.engine.engine import Engine
from workers.engine.lower_draft import LowerDraft

MODELS = Path(__file__).parents[1] / "models"
PLAIN = "plain"


@dataclass(slots=True)
class Cost:
    """Of decoding, after the prompt."""

    num_tokens: int = 0
    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    target_s: float = 0.0  # of CPU
    draft_s: float = 0.0

    def add(self, other: "Cost") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def token_s(self) -> float:
        return (self.target_s + self.draft_s) / self.num_tokens


@dataclass(slots=True)
class Drafter:
    engine: DraftEngine
    lower: LowerDraft | None = None
    cost: Cost = field(default_factory=Cost)
    gains: list[float] = field(default_factory=list)  # of each prompt, over plain decoding


class _Player:
    """One engine that holds one seq."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._round_id = 0

    def start(self, token_ids: Sequence[int], sampling: SeqSampling) -> RowResult:
        self._engine.reset()
        init = SeqInit(
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            block_table=range(MAX_LEN // BLOCK_SIZE),
        )
        return self.send(Row(chunk_len=len(token_ids)), [init])

    def send(self, row: Row, inits: Sequence[SeqInit] = ()) -> RowResult:
        self._round_id += 1
        round_ = Round(round_id=self._round_id, init_seqs=inits, rows=[row])
        self._engine.check(round_)
        return self._engine.run(round_).rows[0]


def decode(
    target: Engine, draft: Engine | None, prompt: Sequence[int], sampling: SeqSampling, *, k: int, num_tokens: int
) -> Cost:
    """Decode until `num_tokens` have come or a little more."""
    verifier, cost = _Player(target), Cost()
    length = len(prompt) + 1  # tokens of the history
    token_id = verifier.start(prompt, sampling).token_ids[0]
    drafter = None if draft is None else _Player(draft)
    if drafter is not None:
        drafter.start(prompt, sampling)
    order = Row(append_token_ids=[token_id], chunk_len=1, num_draft_tokens=k)
    while cost.num_tokens < num_tokens:
        began = time.process_time()
        drafts = [] if drafter is None else list(drafter.send(order).token_ids)
        drafted = time.process_time()
        result = verifier.send(Row(chunk_len=1, draft_token_ids=drafts, draft_base_len=length))
        cost.target_s += time.process_time() - drafted
        cost.draft_s += drafted - began
        num_accepted = result.num_accepted_tokens
        order = Row(
            crop_len=length + num_accepted,
            append_token_ids=result.token_ids[-1:],
            chunk_len=2 if num_accepted == len(drafts) and drafts else 1,
            num_draft_tokens=k,
        )
        length += len(result.token_ids)
        cost.num_rounds += 1
        cost.num_tokens += len(result.token_ids)
        cost.num_drafted += len(drafts)
        cost.num_accepted += num_accepted
    return cost


def measure(
    target: Engine, drafters: dict[str, Drafter], prompts: Sequence[list[int]], sampling: SeqSampling, **options: int
) -> Cost:
    """Fills the drafters' costs; returns that of plain decoding."""
    plain = Cost()
    for prompt in prompts:
        alone = decode(target, None, prompt, sampling, **options)
        plain.add(alone)
        for drafter in drafters.values():
            drafter.engine.lower = drafter.lower
            cost = decode(target, drafter.engine, prompt, sampling, **options)
            drafter.cost.add(cost)
            drafter.gains.append(alone.token_s / cost.token_s)
    return plain


def rows_of(plain: Cost, drafters: dict[str, Drafter]) -> list[list[str]]:
    rows = [[PLAIN, f"{1e3 * plain.target_s / plain.num_rounds:.1f}", "", "", "", "", f"{1e3 * plain.token_s:.1f}", ""]]
    for name, drafter in drafters.items():
        cost = drafter.cost
        rows.append(
            [
                name,
                f"{1e3 * cost.target_s / cost.num_rounds:.1f}",
                f"{1e3 * cost.draft_s / cost.num_rounds:.1f}",
                "" if drafter.lower is None else f"{share(drafter.lower.num_kept, cost.num_drafted):.2f}",
                f"{share(cost.num_accepted, cost.num_drafted):.2f}",
                f"{cost.num_tokens / cost.num_rounds:.2f}",
                f"{1e3 * cost.token_s:.1f}",
                f"{Spread.of(drafter.gains):.2f}",
            ]
        )
    return rows


HEADER = [
    "drafter",
    "CPU ms, target round",
    "CPU ms, draft round",
    "drafts from beneath",
    "accepted/drafted",
    "tokens/round",
    "CPU ms/token",
    "x plain",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft", help="also the model beneath self-drafts")
    parser.add_argument("--self-drafts", nargs="*", choices=["int8", "int4", "mxfp4"], default=["int4"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-k", type=int, default=5, help="drafts per round")
    parser.add_argument(
        "--forced-acceptances",
        type=float,
        nargs="+",
        default=[0.0],
        help="shares of drafts that count as right; 0: off",
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--name", default="levels", help="name of the report")
    add_report_options(parser)
    return parser.parse_args()


def drafters_of(engines: dict[str, tuple[DraftEngine, LowerDraft | None]]) -> dict[str, Drafter]:
    """Each engine alone, with a lookup beneath it, and with the model that was loaded beneath it."""
    drafters = {}
    for name, (engine, model) in engines.items():
        drafters |= {name: Drafter(engine), f"{name}, suffix beneath": Drafter(engine, ChainLookup())}
        if model is not None:
            model.num_kept = model.num_proposed = 0
            drafters[f"{name}, draft beneath"] = Drafter(engine, model)
    return drafters


def load_drafts(args: argparse.Namespace) -> dict[str, tuple[DraftEngine, LowerDraft | None]]:
    """The sibling, and self-drafts with the sibling beneath them."""
    wanted = {"sibling": (args.draft, {})}
    for format in args.self_drafts:
        wanted[f"self, {format}"] = (args.target, {"quantization": format, "lower_model": str(args.draft)})
    drafts = {}
    for name, (folder, options) in wanted.items():
        engine = load(folder, ENGINE_ROLE_DRAFT, dtype=args.dtype, max_num_seqs=1, device="cpu", **options)
        assert isinstance(engine, DraftEngine), "loaded as drafts"
        drafts[name] = engine, engine.lower
    return drafts


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    drafts = load_drafts(args)
    tokenizer = load_tokenizer(args.target)
    prompts = [tokenizer.encode(text).ids for text in load_prompts(None, args.prompts)]
    parts = [
        f"{args.target.name} and {args.draft.name}, {args.dtype}, {args.threads} thread(s), k = {args.k}, "
        f"{args.prompts} prompts x {args.tokens} tokens. CPU time of rounds without scheduler and wires; x plain: "
        "median (least-greatest) of the prompts."
    ]
    for forced in args.forced_acceptances:
        options = {"dtype": args.dtype, "max_num_seqs": 1, "device": "cpu", "forced_acceptance": forced}
        target = load(args.target, ENGINE_ROLE_TARGET, **options)
        for temperature in args.temperatures if not forced else [0.0]:
            drafters = drafters_of(drafts)
            sampling = (
                SeqSampling(temperature=temperature, top_p=1, repetition_penalty=1, seed=1) if temperature else GREEDY
            )
            plain = measure(target, drafters, prompts, sampling, k=args.k, num_tokens=args.tokens)
            title = f"Acceptance forced to {forced:g}" if forced else f"Temperature {temperature:g}"
            parts.append(f"## {title}\n\n" + table(HEADER, rows_of(plain, drafters)))
    command = shlex.join(["python", "-m", "bench.levels", *sys.argv[1:]])
    publish(args.name, "\n\n".join(parts), command=command, save=args.save, on=hardware("cpu"))


if __name__ == "__main__":
    main()
