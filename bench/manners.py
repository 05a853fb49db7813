"""What a deployment loses beside busy processes, against what fair sharing of the cores explains.

    python -m bench.manners --threads 2 --turns 5 --save

A colocated pair speculates with one request. It runs alone, beside one and beside two processes that compute all the
time, in turn. CPU time that the deployment and the busy processes really got comes from the system. The exit status is
1 if the loss is more than 1.5 times what fair sharing explains.

Where programs of others take more than a tenth of a core, wall time says little. Then tokens per CPU second decide:
threads that spin get CPU time and make no tokens of it.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.load import run_side_by_side
from bench.peers.machine import OtherWork, process_stats, tree_ticks
from bench.prompts import load_prompts
from bench.report import Spread, add_report_options, publish, table
from cluster.deployment.settings import CpuSettings, KvCacheSettings, SchedulerSettings, SpeculationSettings
from cluster.local import LOCAL_SERVER, LocalDeployment, LocalDraft, local_settings

MODELS = Path(__file__).parents[1] / "models"
ALLOWED = 1.5  # times the loss that fair sharing explains
_QUIET_CORES = 0.1  # of others, at most, for wall time to count
_NOT_QUIET = (
    "Others computed in the runs without busy processes too, so these show what more load costs, not what a quiet "
    "machine gives."
)
_BUSY = "while True: pass"


@dataclass(frozen=True, slots=True)
class Run:
    """Of one request after another."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    cores: float  # that the deployment got
    busy_cores: float  # that the busy processes got
    other_cores: float  # that everything else got


def fair_cores(wanted: float, *, threads: int, num_busy: int, num_cores: int) -> float:
    """What threads that want `wanted` cores together get beside busy processes, if the cores are shared max-min fairly:
    nobody gets less than another that has more than it wants."""
    own = [wanted / threads] * threads
    left, demands = float(num_cores), sorted([*own, *[1.0] * num_busy])
    for index, demand in enumerate(demands):
        share = left / (len(demands) - index)
        if share <= demand:
            return sum(min(each, share) for each in own)
        left -= demand
    return wanted


def excess(alone: Sequence[Run], beside: Sequence[Run], fair_share: float) -> float:
    """How many times the loss that fair sharing explains; 1: just that. fair_share: of the cores that it has alone."""
    runs = [*alone, *beside]
    if max(run.other_cores for run in runs) <= _QUIET_CORES:
        slowdown = _median(alone, "tokens_per_s") / _median(beside, "tokens_per_s")
        return slowdown * fair_share
    return _median(alone, "tokens_per_cpu_s") / _median(beside, "tokens_per_cpu_s")


def _median(runs: Sequence[Run], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def _cpu_s(pids: Sequence[int]) -> float:
    stats = process_stats()
    return sum(tree_ticks(stats, pid) for pid in pids) / os.sysconf("SC_CLK_TCK")


def measure(address: str, pids: Sequence[int], num_busy: int, prompts: Sequence[str], num_tokens: int) -> Run:
    with ExitStack() as stack:
        busy = [stack.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY])) for _ in range(num_busy)]
        for process in busy:
            stack.callback(process.kill)
        busy_pids, others = [process.pid for process in busy], OtherWork()
        cpu_s, busy_s, began_s = _cpu_s(pids), _cpu_s(busy_pids), time.perf_counter()
        options = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        timed = run_side_by_side(address, prompts, options, concurrency=1)  # type: ignore[arg-type]
        seconds = time.perf_counter() - began_s
        cpu_s, busy_s = _cpu_s(pids) - cpu_s, _cpu_s(busy_pids) - busy_s
        return Run(
            tokens_per_s=timed.tokens_per_s,
            tokens_per_cpu_s=timed.num_tokens / cpu_s,
            cores=cpu_s / seconds,
            busy_cores=busy_s / seconds,
            other_cores=others.cores() or 0.0,
        )


def _row(num_busy: int, runs: Sequence[Run]) -> list[str]:
    names = Run.__slots__
    return [str(num_busy), *(f"{Spread.of([getattr(run, name) for run in runs]):.2f}" for name in names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--busy", type=int, nargs="+", default=[1, 2], help="numbers of busy processes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    add_report_options(parser)
    args = parser.parse_args()
    settings = local_settings(
        args.target,
        draft=LocalDraft(folder=args.draft, colocated=True),
        dtype="bfloat16",
        cpu=CpuSettings(threads_per_worker=args.threads),
        kv_cache=KvCacheSettings(device_bytes=256 << 20),
        scheduler=SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=512, max_model_len=1024),
        speculation=SpeculationSettings(num_speculative_tokens=5),
        server=LOCAL_SERVER,
    )
    prompts = load_prompts(None, args.prompts)
    runs: dict[int, list[Run]] = {number: [] for number in (0, *args.busy)}
    with LocalDeployment(settings, gateway=True) as deployment:
        processes = deployment.processes.read(lambda board: board.processes)
        pids = [process.pid for process in processes if process.pid is not None]
        address = deployment.running.gateway_address
        measure(address, pids, 0, prompts, args.tokens)  # warms up
        for _ in range(args.turns):
            for number, done in runs.items():
                done.append(measure(address, pids, number, prompts, args.tokens))
    alone, num_cores = runs[0], len(os.sched_getaffinity(0))
    wanted, excesses = _median(alone, "cores"), {}
    for number in args.busy:
        fair = fair_cores(wanted, threads=args.threads, num_busy=number, num_cores=num_cores)
        excesses[number] = excess(alone, runs[number], fair / wanted)
    header = ["busy processes", "tokens/s", "tokens/CPU second", "cores of ours", "cores of the busy", "of others"]
    losses = [f"beside {n}, {times:.2f} times what fair sharing explains" for n, times in excesses.items()]
    is_quiet = max(run.other_cores for each in runs.values() for run in each) <= _QUIET_CORES
    basis = "by wall time" if is_quiet else "by CPU time"
    warning = "" if is_quiet else f"\n\n{_NOT_QUIET}"
    body = (
        f"{args.target.name} and {args.draft.name}, colocated, bf16, k = 5, {args.threads} thread(s), one request at a "
        f"time, {args.prompts} prompts x {args.tokens} tokens, {args.turns} turns: median (least-greatest).\n\n"
        f"Loss {basis}: {'; '.join(losses)} (limit {ALLOWED}).{warning}\n\n"
        + table(header, [_row(number, done) for number, done in runs.items()])
    )
    publish("manners", body, command=shlex.join(["python", "-m", "bench.manners", *sys.argv[1:]]), save=args.save)
    return int(any(times > ALLOWED for times in excesses.values()))


if __name__ == "__main__":
    sys.exit(main())
