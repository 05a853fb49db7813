"""Structured output is valid, and the same however drafts are made: random JSON schemas on whole deployments.

    python -m tests.property.equal_schemas --schemas 200 --tp 1 2 --save

Each schema is asked for once, at temperature 0, 0.7 or 1. One deployment after another answers all of them: without
drafts, with a draft model (serial and continuous), with a draft made from the target itself, and with drafts from
earlier text. In bf16 with `batch_invariant`, so not a token may differ. An output that ended by itself must be valid.

Prints a row for each deployment and each output that is wrong. The exit status is 1 if there was one.
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from bench.report import add_report_options, publish, table
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings, SpeculationSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from echelon import AsyncClient
from echelon.results import Completion
from tests.helpers.random_schemas import random_schema

MODELS = Path(__file__).parents[2] / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
PROMPTS = ("def fibonacci(n):\n    ", "import json\n\nconfig = ", "class Stack:\n    def __init__(self", "# data\n")
TEMPERATURES = (0.0, 0.7, 1.0)
MAX_TOKENS = 120
CONCURRENCY = 32
Way = tuple[LocalDraft | None, SpeculationSettings]
WAYS: dict[str, Way] = {
    "off": (None, SpeculationSettings()),
    "serial": (LocalDraft(folder=DRAFT), SpeculationSettings(pipeline="serial", num_speculative_tokens=4)),
    "continuous": (LocalDraft(folder=DRAFT), SpeculationSettings(pipeline="continuous", num_speculative_tokens=4)),
    "self-draft": (LocalDraft(folder=TARGET, quantization="int4"), SpeculationSettings(num_speculative_tokens=4)),
    "suffix": (None, SpeculationSettings(method="suffix", num_speculative_tokens=4)),
}


@dataclass(frozen=True, slots=True)
class Case:
    schema: dict[str, Any]
    prompt: str
    temperature: float
    seed: int


def make_cases(num_schemas: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    return [
        Case(random_schema(rng), PROMPTS[i % len(PROMPTS)], TEMPERATURES[i % len(TEMPERATURES)], i)
        for i in range(num_schemas)
    ]


def answers(cases: Sequence[Case], way: Way, tp_size: int) -> list[Completion]:
    draft, speculation = way
    settings = local_settings(
        TARGET,
        tp_size=tp_size,
        draft=draft,
        dtype="bfloat16",
        batch_invariant=True,
        kv_cache=KvCacheSettings(device_bytes=64 << 20),
        scheduler=SchedulerSettings(max_num_seqs=CONCURRENCY, max_num_batched_tokens=1024, max_model_len=512),
        speculation=speculation,
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        return asyncio.run(_ask(deployment.running.gateway_address, cases))


async def _ask(address: str, cases: Sequence[Case]) -> list[Completion]:
    turns = asyncio.Semaphore(CONCURRENCY)

    async def ask(client: AsyncClient, case: Case) -> Completion:
        async with turns:
            return await client.generate(
                case.prompt,
                structured_output={"json_schema": case.schema},
                temperature=case.temperature,
                seed=case.seed,
                max_tokens=MAX_TOKENS,
            )

    async with AsyncClient(address) as client:
        return await asyncio.gather(*(ask(client, case) for case in cases))


def problem_of(case: Case, answer: Completion, plain: Completion) -> str | None:
    if answer.token_ids != plain.token_ids:
        return f"is {answer.text!r}, and without drafts {plain.text!r}"
    if answer.finish_reason != "length":
        try:
            jsonschema.Draft202012Validator(case.schema).validate(json.loads(answer.text))
        except (ValueError, jsonschema.ValidationError) as err:
            return f"{answer.text!r} is not valid: {str(err).splitlines()[0]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    add_report_options(parser)
    args = parser.parse_args()
    cases, rows, problems = make_cases(args.schemas, args.seed), list[list[str]](), list[str]()
    for tp_size in args.tp:
        plain: list[Completion] = []
        for name, way in WAYS.items():
            found = answers(cases, way, tp_size)
            plain = plain or found
            wrong = [
                f"tp {tp_size}, {name}, schema {case.seed} {json.dumps(case.schema)}: {problem}"
                for case, answer, base in zip(cases, found, plain, strict=True)
                if (problem := problem_of(case, answer, base)) is not None
            ]
            problems += wrong
            rows.append([str(tp_size), name, *map(str, _counts(found)), str(len(wrong))])
            print(" ".join(rows[-1]), *wrong, sep="\n", file=sys.stderr, flush=True)
    header = ["tp", "drafts", "outputs", "ended", "tokens", "drafted", "accepted", "wrong"]
    command = shlex.join(["python", "-m", "tests.property.equal_schemas", *sys.argv[1:]])
    publish("equal-schemas", "\n\n".join([table(header, rows), *problems]), command=command, save=args.save)
    return int(bool(problems))


def _counts(found: Sequence[Completion]) -> list[int]:
    return [
        len(found),
        sum(answer.finish_reason != "length" for answer in found),
        sum(len(answer.token_ids) for answer in found),
        sum(answer.speculation.num_draft_tokens for answer in found),
        sum(answer.speculation.num_accepted_tokens for answer in found),
    ]


if __name__ == "__main__":
    sys.exit(main())
