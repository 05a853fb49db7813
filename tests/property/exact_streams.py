"""Thousands of streams under changing load, each next to its twin without drafts: no token and no logprob may differ in
bf16 with `batch_invariant`.

    python -m tests.property.exact_streams --streams 2000 --seed 1

Every pipeline and source of drafts runs with the target on one rank and on two. The KV cache is so small that seqs are
preempted, and between 1 and 32 requests run at a time. Prints for each deployment how many streams there were, with how
many verified drafts and preemptions, and the streams that differ. The exit status is 1 if some do.
"""

import argparse
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from bench.report import add_report_options, publish, table
from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings, SpeculationSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from echelon.pb import scheduler_pb2, scheduler_pb2_grpc
from tests.helpers.deployment_streams import DRAFT, MAX_MODEL_LEN, NUM_DRAFTS, PROMPTS, SETTINGS, TARGET
from tests.helpers.scheduler_client import SchedulerClient

_MOST_AT_ONCE = 32
_NUM_TOKENS = (8, 80)  # of an output
_KV_CACHE_BYTES = 4 << 20  # of all ranks: 64 blocks of the target, and a request takes up to 8 of them
HEADER = ["deployment", "ranks of the target", "streams", "drafts verified", "preemptions", "differ"]
_CONTINUOUS = {"pipeline": "continuous"}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "serial": {"speculation": {"pipeline": "serial"}},
    "continuous": {"speculation": _CONTINUOUS | {"verdict_cache": "off"}},
    "verdict cache": {"speculation": _CONTINUOUS | {"verdict_cache": 6}},
    "colocated": {"draft": {"colocated": True}},
    "layer-parallel": {"draft": {"layer_parallel_size": 2}, "speculation": _CONTINUOUS},
    "colocated, layer-parallel": {"draft": {"colocated": True, "layer_parallel_size": 4}},
    "self-draft": {"draft": {"folder": TARGET, "num_layers": 4}, "speculation": _CONTINUOUS},
    "self-draft, colocated, int4": {"draft": {"folder": TARGET, "quantization": "int4", "colocated": True}},
    "lookup": {"draft": None, "speculation": {"method": "suffix"}},
    "hybrid": {"speculation": _CONTINUOUS | {"method": "hybrid"}},
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream, and how many drafts a round may verify: None leaves it to the policy."""

    prompt: list[int]
    settings: dict[str, Any]
    num_drafts: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one deployment."""

    num_streams: int
    num_drafts: int  # verified
    num_preemptions: int
    different: list[str]  # what differs, for people

    @property
    def cells(self) -> list[str]:
        return [
            str(number) for number in (self.num_streams, self.num_drafts, self.num_preemptions, len(self.different))
        ]


def draw(rng: random.Random, prompts: Sequence[list[int]]) -> Wanted:
    name = rng.choice(list(SETTINGS))
    settings = {
        **SETTINGS[name],
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "seed": rng.getrandbits(63),
        "max_tokens": rng.randint(*_NUM_TOKENS),
    }
    prompt = rng.choice(prompts)
    return Wanted(prompt[: rng.randint(4, len(prompt))], settings, rng.choice((*NUM_DRAFTS[1:], None)))


def run(name: str, tp_size: int, num_streams: int, rng: random.Random) -> Outcome:
    """Start a deployment and send each stream and its twin, in random order."""
    made = DEPLOYMENTS[name]
    draft: dict[str, Any] | None = made.get("draft", {})
    settings = local_settings(
        TARGET,
        draft=None if draft is None else LocalDraft(**{"folder": DRAFT} | draft),
        tp_size=tp_size,
        dtype="bfloat16",
        batch_invariant=True,
        kv_cache=KvCacheSettings(
            device_bytes=_KV_CACHE_BYTES // tp_size * (2 if draft and "colocated" in draft else 1)
        ),
        scheduler=SchedulerSettings(
            max_num_seqs=_MOST_AT_ONCE, max_num_batched_tokens=192, max_model_len=MAX_MODEL_LEN // 2
        ),
        speculation=SpeculationSettings(**{"num_speculative_tokens": max(NUM_DRAFTS)} | made.get("speculation", {})),
    )
    with (
        LocalDeployment(settings) as deployment,
        open_blocking_channel(deployment.running.replicas[0].scheduler_address) as channel,
    ):
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        client, streams = SchedulerClient(stub, ignore_eos=True), _streams(num_streams, rng)
        _send(client, streams, rng)
        status = stub.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())
    return Outcome(
        num_streams=num_streams,
        num_drafts=sum(end.speculation.num_draft_tokens for end in client.ends.values()),
        num_preemptions=status.num_preemptions_total,
        different=_compare(client, streams),
    )


def _streams(num_streams: int, rng: random.Random) -> dict[str, Wanted]:
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    prompts = [tokenizer.encode(text * 3).ids for text in PROMPTS]
    return {str(number): draw(rng, prompts) for number in range(num_streams)}


def _send(client: SchedulerClient, streams: dict[str, Wanted], rng: random.Random) -> None:
    """Send every stream and its twin; how many run at a time changes every now and then."""
    waiting = [(name, kind) for name in streams for kind in ("drafted", "plain")]
    rng.shuffle(waiting)
    num_sent, most = 0, 1
    while num_sent < len(waiting) or len(client.ends) < num_sent:
        if rng.random() < 0.02:
            most = rng.choice((1, 2, 8, _MOST_AT_ONCE))
        while num_sent < len(waiting) and num_sent - len(client.ends) < most:
            name, kind = waiting[num_sent]
            wanted = streams[name]
            num_drafts = wanted.num_drafts if kind == "drafted" else 0
            client.submit(f"{name} {kind}", wanted.prompt, num_drafts=num_drafts, **wanted.settings)
            num_sent += 1
        client.next_reply()
    client.finish(num_sent)


def _compare(client: SchedulerClient, streams: dict[str, Wanted]) -> list[str]:
    different = []
    for name, wanted in streams.items():
        drafted, plain = (f"{name} drafted", 0), (f"{name} plain", 0)
        if client.tokens[drafted] != client.tokens[plain]:
            different.append(f"tokens of {wanted}: {client.tokens[drafted]} and {client.tokens[plain]}")
        elif client.logprobs.get(drafted) != client.logprobs.get(plain):
            different.append(f"logprobs of {wanted}")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000, help="over all deployments; each has a twin besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(DEPLOYMENTS), choices=list(DEPLOYMENTS))
    parser.add_argument("--tp-sizes", type=int, nargs="+", default=[1, 2])
    add_report_options(parser)
    args = parser.parse_args()
    pairs = [(name, tp_size) for tp_size in args.tp_sizes for name in args.only]
    num_each = -(-args.streams // len(pairs))
    rows, num_different = [], 0
    for name, tp_size in pairs:
        began_s = time.monotonic()
        outcome = run(name, tp_size, num_each, random.Random(f"{args.seed} {name} {tp_size}"))
        num_different += len(outcome.different)
        rows.append([name, str(tp_size), *outcome.cells])
        print(", ".join(rows[-1]), f"({time.monotonic() - began_s:.0f} s)", *outcome.different, sep="\n  ", flush=True)
    verdict = f"{num_different} of {num_each * len(pairs)} streams differ from plain decoding by the same ranks."
    command = shlex.join(["python", "-m", "tests.property.exact_streams", *sys.argv[1:]])
    publish("exact-streams", f"{verdict}\n\n{table(HEADER, rows)}", command=command, save=args.save)
    sys.exit(1 if num_different else 0)


if __name__ == "__main__":
    main()
