"""What the tiers of the KV cache gain.

First tokens: the time to the first token of a prompt whose prefix has to be computed, lies on the device, in host
memory, or on disk with a cold page cache. Conversations: requests per second and times to the first token of
conversations whose KV is several times as large as the device, with tiers and without. Strangers: the same for prompts
that never repeat.

    python -m bench.inflate models/demo-target /tmp/target --preset target-455m --max-len 20480
    python -m bench.inflate models/demo-draft /tmp/draft --preset draft-32m --max-len 20480
    python -m bench.tiers --target /tmp/target --draft /tmp/draft --threads 2 --lengths 1024 4096
"""

import argparse
import asyncio
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.report import Spread, add_report_options, hardware, publish, table
from childproc.tier_block import TierDtype
from cluster.deployment.settings import CpuSettings, DiskSettings, KvCacheSettings, Settings
from cluster.local import LOCAL_SCHEDULER, LocalDeployment, LocalDraft, local_settings
from cluster.processes.child import Child
from cluster.processes.specs import ENGINE_ROLES
from cluster.processes.startup import Launch
from echelon import AsyncClient, Client
from echelon.pb.process_pb2 import SchedulerSpec, WorkerSpec
from echelon.results import Completion

MODELS = Path(__file__).parents[1] / "models"
START_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 60.0  # nothing is given up: slow hits shall be seen
ROUND_TIMEOUT_S = 300.0  # a large model on few cores takes long for a round of a prompt
ROUND_TOKENS = 512
BLOCK_SIZE = 16
CHECKED_TOKENS = 8  # compared between a computed prefix and one that comes back
SPARE_TOKENS = 64  # room on the device beyond one prompt

Prompt = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all parts measure on."""

    target: Path
    draft: Path | None
    dtype: str | None
    device: str
    threads: int
    vocab_size: int
    tier_dtype: TierDtype = "same"

    def settings(self, *, device_tokens: int, host_tokens: int, disk: Path | None, max_num_seqs: int) -> Settings:
        """Room for so many tokens of target and draft on the device, in whole blocks, and in host memory; the disk has
        room for all."""
        device_tokens = -(-device_tokens // BLOCK_SIZE) * BLOCK_SIZE
        plain = local_settings(
            self.target,
            draft=LocalDraft(folder=self.draft, colocated=True) if self.draft else None,
            dtype=self.dtype,
            device="cuda" if self.device == "cuda" else "cpu",
            cpu=CpuSettings(threads_per_worker=self.threads),
            scheduler=replace(LOCAL_SCHEDULER, max_num_seqs=max_num_seqs, max_num_batched_tokens=ROUND_TOKENS),
            startup_timeout_s=START_TIMEOUT_S,
            collective_timeout_s=ROUND_TIMEOUT_S,
        )
        per_token = sum(model.kv_bytes_per_token for model in (plain.target, plain.draft) if model is not None)
        room = KvCacheSettings(
            block_size=BLOCK_SIZE,
            device_bytes=per_token * device_tokens,
            cpu_bytes=per_token * host_tokens,
            disk=DiskSettings(path=str(disk), bytes=per_token * host_tokens * 2, write="all") if disk else None,
            load_timeout_s=LOAD_TIMEOUT_S,
            tier_dtype=self.tier_dtype,
        )
        longest = min(plain.max_model_len, device_tokens)
        return replace(plain, kv_cache=room, scheduler=replace(plain.scheduler, max_model_len=longest))

    def prompt(self, seed: int, num_tokens: int) -> Prompt:
        """Ordinary tokens, no two prompts alike from the first token on."""
        rng = random.Random(seed)
        return rng.choices(range(16, self.vocab_size - 16), k=num_tokens)


# -- first tokens -----------------------------------------------------------------------------------------------------


class LimitedDeployment(LocalDeployment):
    """One whose devices hold as many tokens as the settings say, on GPUs too."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, gateway=True)
        self._limited_to = settings

    def spawn(self, launch: Launch) -> Child:
        if isinstance(launch.spec, WorkerSpec):
            limit(launch.spec, self._limited_to)
        return super().spawn(launch)


def limit(spec: WorkerSpec, settings: Settings) -> None:
    """Otherwise an engine on a GPU takes all memory that its weights leave, and evicts nothing."""
    as_on_cpu = replace(settings, device="cpu")
    roles = {number: role for role, number in ENGINE_ROLES.items()}
    for engine in spec.engines:
        engine.kv_cache_bytes = as_on_cpu.kv_cache_bytes(roles[engine.role])


class FetchingDeployment(LimitedDeployment):
    """One that fetches whatever is there, whatever it expects of it: slow hits shall be seen."""

    def spawn(self, launch: Launch) -> Child:
        if isinstance(launch.spec, SchedulerSpec):
            launch.spec.tiers.ignores_prices = True
        return super().spawn(launch)


def first_tokens(bench: Bench, length: int, runs: int) -> dict[str, list[float]]:
    """Seconds to the first token by where the prefix was. The device holds one prompt, so two that take turns push each
    other out of it. Raises RuntimeError if a prefix came from elsewhere, or if one that is exact changed the tokens."""
    times: dict[str, list[float]] = {"computed": [], "device": [], "host memory": [], "disk": []}
    pair = [bench.prompt(seed, length) for seed in (1, 2)]
    outputs: dict[int, tuple[int, ...]] = {}

    def ask(client: Client, number: int, place: str) -> None:
        done = client.generate(pair[number], max_tokens=CHECKED_TOKENS, temperature=0.0, ignore_eos=True)
        check(done, place, length)
        if outputs.setdefault(number, done.token_ids) != done.token_ids and bench.tier_dtype == "same":
            raise RuntimeError(f"{place}: the tokens differ from those of the computed prefix")
        times[place].append(done.timings.first_token_s)
        print(f"{length} tokens, {place}: {done.timings.first_token_s:.3f} s", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="echelon-tiers-") as folder:
        settings = bench.settings(
            device_tokens=length + SPARE_TOKENS, host_tokens=4 * length, disk=Path(folder), max_num_seqs=4
        )
        with (
            FetchingDeployment(settings) as deployment,
            Client(deployment.running.gateway_address) as client,
        ):
            warm_up(client, bench)
            for number in range(2):
                ask(client, number, "computed")
                ask(client, number, "device")
            for _ in range(runs):
                for number in range(2):
                    ask(client, number, "host memory")
                    ask(client, number, "device")
        for _ in range(runs):
            drop_page_cache(Path(folder))
            with (
                FetchingDeployment(settings) as deployment,
                Client(deployment.running.gateway_address) as client,
            ):
                warm_up(client, bench)
                for number in range(2):
                    ask(client, number, "disk")
    return times


def drop_page_cache(folder: Path) -> None:
    """Forget what memory holds of the files below the folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(done: Completion, place: str, length: int) -> None:
    """The prefix must have come from there, all but its last blocks."""
    usage = done.usage
    from_host, from_disk = usage.cached_prompt_tokens_from_host, usage.cached_prompt_tokens_from_disk
    found = {
        "computed": 0,
        "device": usage.cached_prompt_tokens - from_host - from_disk,
        "host memory": from_host,
        "disk": from_disk,
    }[place]
    if place == "computed" and usage.cached_prompt_tokens:
        raise RuntimeError(f"computed: {usage.cached_prompt_tokens} tokens were known already")
    if place != "computed" and found < 0.9 * length:
        raise RuntimeError(f"{place}: only {found} of {length} tokens came from there ({usage})")


def warm_up(client: Client, bench: Bench) -> None:
    """Let the first round, which is slow, be over, and the scheduler learn how long rounds take."""
    for seed, num_tokens in ((101, 32), (102, 128), (103, 64)):
        client.generate(bench.prompt(seed, num_tokens), max_tokens=4, temperature=0.0, ignore_eos=True)


# -- conversations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """Conversations that go on at the same time. Each turn repeats all before it."""

    conversations: int
    turns: int
    new_tokens: int  # of a turn
    output_tokens: int
    repeats: bool = True  # False: no turn begins with what came before

    @property
    def num_tokens(self) -> int:
        """Of all conversations at their end."""
        return self.conversations * self.turns * (self.new_tokens + self.output_tokens)


@dataclass(frozen=True, slots=True)
class Talked:
    requests_per_s: float
    later_turns_s: list[float]  # times to the first token from the second turn on


def talk(address: str, bench: Bench, plan: Talk) -> Talked:
    later: list[float] = []

    async def converse(client: AsyncClient, number: int) -> None:
        history: Prompt = []
        for turn in range(plan.turns):
            fresh = bench.prompt(1000 * number + turn + 7, plan.new_tokens + (0 if plan.repeats else len(history)))
            prompt = history + fresh if plan.repeats else fresh
            done = await client.generate(prompt, max_tokens=plan.output_tokens, temperature=0.0, ignore_eos=True)
            if turn:
                later.append(done.timings.first_token_s)
            history = [*prompt, *done.token_ids]

    async def run() -> float:
        async with AsyncClient(address) as client:
            await client.server_info()
            started = time.perf_counter()
            await asyncio.gather(*(converse(client, number) for number in range(plan.conversations)))
            return time.perf_counter() - started

    seconds = asyncio.run(run())
    return Talked(plan.conversations * plan.turns / seconds, later)


def talks(bench: Bench, plan: Talk, runs: int, *, device_share: int) -> dict[str, list[Talked]]:
    """The same conversations without tiers and with host memory for all of them, in turn."""
    results: dict[str, list[Talked]] = {"device alone": [], "with host memory": []}
    for run in range(runs):
        for name, done in results.items():
            settings = bench.settings(
                device_tokens=plan.num_tokens // device_share,
                host_tokens=0 if name == "device alone" else 2 * plan.num_tokens,
                disk=None,
                max_num_seqs=plan.conversations,
            )
            with LimitedDeployment(settings) as deployment:
                address = deployment.running.gateway_address
                with Client(address) as client:
                    warm_up(client, bench)
                done.append(talk(address, bench, plan))
            print(f"run {run + 1}/{runs}, {name}: {done[-1].requests_per_s:.2f} requests/s", file=sys.stderr)
    return results


# -- report -----------------------------------------------------------------------------------------------------------


def first_tokens_report(lengths: dict[int, dict[str, list[float]]]) -> str:
    rows = []
    for length, times in lengths.items():
        computed_s = statistics.median(times["computed"])
        for place, seconds in times.items():
            gain = computed_s / statistics.median(seconds)
            rows.append([f"{length:,}", place, f"{1e3 * Spread.of(seconds).median:,.0f}", f"{gain:.1f}"])
    return table(["prompt tokens", "prefix", "first token, ms", "x computed"], rows)


def talks_report(results: dict[str, list[Talked]]) -> str:
    plain = results["device alone"]
    rows = []
    for name, runs in results.items():
        ratios = [run.requests_per_s / base.requests_per_s for run, base in zip(runs, plain, strict=True)]
        later = sorted(seconds for run in runs for seconds in run.later_turns_s)
        p99 = later[min(len(later) - 1, int(0.99 * len(later)))]
        rows.append(
            [
                name,
                f"{Spread.of([run.requests_per_s for run in runs]):.2f}",
                f"{Spread.of(ratios):.2f}",
                f"{statistics.median(later):.2f}",
                f"{p99:.2f}",
            ]
        )
    return table(["", "requests/s", "x device alone", "later turns, first token p50 s", "p99 s"], rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--no-draft", action="store_true")
    parser.add_argument("--tier-dtype", choices=["same", "int8", "int4"], default="same")
    parser.add_argument("--dtype", help="default: the checkpoints' own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=0, help="0: leave out")
    parser.add_argument(
        "--strangers", type=int, default=0, help="conversations whose turns do not repeat; 0: leave out"
    )
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--device-share", type=int, default=4, help="the device holds this part of all KV")
    parser.add_argument("--vocab-size", type=int, default=4096)
    add_report_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    bench = Bench(
        target=args.target,
        draft=None if args.no_draft else args.draft,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        vocab_size=args.vocab_size,
        tier_dtype=args.tier_dtype,
    )
    parts: list[str] = []
    if args.lengths:
        parts.append(first_tokens_report({n: first_tokens(bench, n, args.runs) for n in args.lengths}))
    shape = {"turns": args.turns, "new_tokens": args.new_tokens, "output_tokens": args.output_tokens}
    for count, repeats, title in ((args.conversations, True, "Conversations"), (args.strangers, False, "Strangers")):
        if count:
            plan = Talk(conversations=count, repeats=repeats, **shape)
            results = talks(bench, plan, args.runs, device_share=args.device_share)
            parts.append(f"{title}: {count} of {args.turns} turns\n\n{talks_report(results)}")
    command: Sequence[str] = ["python", "-m", "bench.tiers", *sys.argv[1:]]
    publish("tiers", "\n\n".join(parts), command=shlex.join(command), save=args.save, on=hardware(args.device))


if __name__ == "__main__":
    main()
