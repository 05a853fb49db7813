"""What scheduler and wires add to a round: how long a device idles between two rounds, with one round in flight.

Scheduler, leader and the other ranks are real processes that talk over real gRPC and the real round channel; only
the engine is replaced by one that answers at once (bench.instant_worker). Echelon normally keeps two rounds in flight;
then a device does not idle as long as a step takes longer than this time.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
from pathlib import Path

import grpc

from bench.instant_worker import GAPS_FILE
from bench.random_model import DEMO
from bench.report import add_report_options, publish, table
from childproc.wires import open_channel
from cluster.processes.child import Child, ChildProcess
from cluster.processes.startup import Launch
from cluster.processes.worker_group import start_worker_group
from echelon import __version__
from echelon.pb.process_pb2 import (
    EngineSpec,
    GroupEndpoint,
    SchedulerSection,
    SchedulerSpec,
    SpeculationSpec,
    WorkerSpec,
)
from echelon.pb.sampling_pb2 import SamplingParams
from echelon.pb.scheduler_pb2 import SchedulerRequest, Submit
from echelon.pb.scheduler_pb2_grpc import SchedulerStub
from echelon.pb.worker_pb2 import ENGINE_ROLE_TARGET
from gateway.requests.sampling import built_in_defaults

HOST = "127.0.0.1"
MAX_MODEL_LEN = 4096
MAX_SEQS = 256
PROMPT_LEN = 16
START_TIMEOUT_S = 300.0


def worker_specs(num_ranks: int) -> list[WorkerSpec]:
    engine = EngineSpec(
        role=ENGINE_ROLE_TARGET,
        tp_size=num_ranks,
        block_size=16,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=8192,
        max_model_len=MAX_MODEL_LEN,
    )
    return [
        WorkerSpec(
            name=f"target-0.{rank}",
            rank=rank,
            world_size=num_ranks,
            host=HOST,
            device="cpu",
            threads=1,
            incarnation=1,
            version=__version__,
            engines=[engine],
            collective_timeout_s=60.0,
        )
        for rank in range(num_ranks)
    ]


def scheduler_spec(leader_address: str) -> SchedulerSpec:
    return SchedulerSpec(
        name="scheduler-0",
        host=HOST,
        version=__version__,
        model_name="instant",
        tokenizer_dir=str(DEMO),
        eos_token_ids=[0],
        target=GroupEndpoint(address=leader_address, incarnation=1),
        speculation=SpeculationSpec(method="none", pipeline="serial"),
        scheduler=SchedulerSection(
            max_num_seqs=MAX_SEQS, max_num_batched_tokens=8192, max_model_len=MAX_MODEL_LEN, max_queue=1024
        ),
        round_timeout_s=60.0,
        max_rounds_in_flight=1,
    )


async def decode(scheduler_address: str, num_seqs: int, num_tokens: int, first_id: int) -> None:
    """Runs `num_seqs` requests of `num_tokens` tokens each, side by side, to their end."""
    async with open_channel(scheduler_address) as channel:
        call = SchedulerStub(channel).Connect()
        for index in range(num_seqs):
            sampling = built_in_defaults()
            sampling.MergeFrom(SamplingParams(seed=1, temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
            submit = Submit(
                request_id=str(first_id + index), prompt_token_ids=[1 + index] * PROMPT_LEN, sampling=sampling
            )
            await call.write(SchedulerRequest(submit=submit))
        num_left = num_seqs
        while num_left:
            batch = await call.read()
            if batch is grpc.aio.EOF or any(reply.HasField("error") for reply in batch.replies):
                raise RuntimeError(f"a request failed: {batch}")
            num_left -= sum(reply.HasField("complete") for reply in batch.replies)
        call.cancel()


def gaps_ms(path: Path, num_seqs: int) -> list[float]:
    """Idle times before the rounds in which all seqs decoded."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return [int(gap) / 1e6 for rows, gap in lines if int(rows) == num_seqs]


def measure(num_ranks: int, seq_counts: list[int], num_tokens: int) -> list[list[str]]:
    """A row of the table for each number of seqs."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gaps = folder / "gaps"

        def spawn(launch: Launch) -> Child:
            env = {**launch.env, GAPS_FILE: str(gaps)}
            log_path = folder / f"{launch.name}.log"
            return ChildProcess("bench.instant_worker", launch.spec, name=launch.name, log_path=log_path, env=env)

        group, processes = start_worker_group(worker_specs(num_ranks), spawn, timeout_s=START_TIMEOUT_S)
        scheduler = ChildProcess(
            "scheduler", scheduler_spec(group.address), name="scheduler", log_path=folder / "scheduler.log"
        )
        try:
            event = scheduler.next_event(timeout_s=60.0)
            if event is None or not event.HasField("ready"):
                raise RuntimeError(f"the scheduler did not start: {event}\n{scheduler.stderr_tail()}")
            for number, num_seqs in enumerate(seq_counts):
                os.truncate(gaps, 0)
                asyncio.run(decode(event.ready.address, num_seqs, num_tokens, first_id=1000 * number))
                values = gaps_ms(gaps, num_seqs)
                p50, p95 = statistics.median(values), statistics.quantiles(values, n=20)[-1]
                rows.append([str(num_ranks), str(num_seqs), f"{p50:.2f}", f"{p95:.2f}", str(len(values))])
        finally:
            scheduler.stop(grace_s=1.0)
            processes.stop(grace_s=1.0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[3, 12], help="tensor-parallel ranks of the group")
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=400, help="rounds measured for each number of seqs")
    add_report_options(parser)
    args = parser.parse_args()
    rows = [row for ranks in args.ranks for row in measure(ranks, args.seqs, args.tokens)]
    body = (
        "Time between the end of a round on the leader and the start of the next, when all seqs decode: result over "
        "gRPC, scheduler, round over gRPC, round channel. All processes share this machine's cores.\n\n"
        + table(["ranks", "seqs", "p50 ms", "p95 ms", "rounds"], rows)
    )
    publish("rounds", body, command="python -m bench.rounds", save=args.save)


if __name__ == "__main__":
    main()
