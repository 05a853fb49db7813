"""What a running job costs a live stream, against the bound `jobs.max_live_slowdown`, and what is left to the job.

A deployment with one live stream at a time, in pairs: once alone, once beside a job whose items never run out, in an
order that changes from pair to pair. The time of a token is that from the stream's first chunk to its last, divided by
the tokens between. The job's tokens are what the scheduler has committed meanwhile, less those of the stream; its speed
alone is measured at the end.

    python -m bench.inflate models/demo-target /tmp/target --preset target-455m
    python -m bench.inflate models/demo-draft /tmp/draft --preset draft-32m
    python -m bench.job_slowdown --target /tmp/target --draft /tmp/draft --save
"""

import argparse
import itertools
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.report import add_report_options, publish, table
from cluster.deployment.settings import JobsSettings, KvCacheSettings, SchedulerSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from echelon import Client
from echelon.control import ControlClient
from echelon.pb.scheduler_pb2 import SchedulerStatus

MODELS = Path(__file__).parents[1] / "models"
_PROMPTS = ("def quicksort(items):\n", "import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self")
_POLL_S = 0.02
_ALONE_S = 5.0


@dataclass(frozen=True, slots=True)
class Run:
    """One live stream. `job_tokens_per_s` is that of the job beside it, 0 without one."""

    token_s: float
    acceptance: float  # of its drafts, a share; 0 without any
    job_tokens_per_s: float


class Bench:
    def __init__(self, client: Client, control: ControlClient, args: argparse.Namespace) -> None:
        self._client = client
        self._control = control
        self._args = args
        self._seeds = itertools.count(1)

    def stream(self) -> Run:
        """The same prompt each time: pairs differ by the job alone."""
        arrivals_s, num_tokens, before = [], [], self._num_committed()
        with self._client.stream(_PROMPTS[0], max_tokens=self._args.tokens, temperature=0, ignore_eos=True) as stream:
            for chunk in stream:
                arrivals_s.append(time.perf_counter())
                num_tokens.append(len(chunk.token_ids))
                if len(arrivals_s) == 1:
                    before = self._num_committed() - num_tokens[0]
            committed, speculation = self._num_committed() - before, stream.result().speculation
        elapsed_s, total = arrivals_s[-1] - arrivals_s[0], sum(num_tokens)
        drafted = speculation.num_draft_tokens
        return Run(
            token_s=elapsed_s / (total - num_tokens[0]),
            acceptance=speculation.num_accepted_tokens / drafted if drafted else 0.0,
            job_tokens_per_s=max(0.0, committed - total) / elapsed_s,
        )

    @contextmanager
    def job(self) -> Iterator[None]:
        """Inside the block a job has items running, and more to come."""
        body = {"max_tokens": self._args.item_tokens, "temperature": 1.0, "ignore_eos": True}
        prompts = [prompt * self._args.prompt_repeats for prompt in _PROMPTS]
        bodies = ({"prompt": f"# {i}\n{prompts[i % len(prompts)]}", **body} for i in range(self._args.items))
        before = self._num_committed()
        job = self._client.jobs.submit(bodies, seed=next(self._seeds))
        while self._num_committed() == before:
            time.sleep(_POLL_S)
        yield
        assert not self._client.jobs.get(job.job_id).has_ended, "the job was too short: give more --items"
        self._client.jobs.cancel(job.job_id)
        while not self._client.jobs.get(job.job_id).has_ended or self._status().num_requests_running:
            time.sleep(_POLL_S)

    def job_alone(self) -> float:
        """Its tokens a second."""
        with self.job():
            before, began_s = self._num_committed(), time.perf_counter()
            time.sleep(_ALONE_S)
            return (self._num_committed() - before) / (time.perf_counter() - began_s)

    def pairs(self) -> list[tuple[Run, Run]]:
        """Without the job and with it."""
        self.stream()  # the deployment learns how long its rounds take
        pairs = []
        for number in range(self._args.pairs):
            if number % 2:
                with self.job():
                    beside = self.stream()
                pairs.append((self.stream(), beside))
            else:
                alone = self.stream()
                with self.job():
                    pairs.append((alone, self.stream()))
            print(f"pair {number + 1}: {_ratio(pairs[-1]):.3f}", file=sys.stderr)
        return pairs

    def _num_committed(self) -> int:
        return self._status().generation_tokens_total

    def _status(self) -> SchedulerStatus:
        return self._control.replicas().replicas[0].status


def _ratio(pair: tuple[Run, Run]) -> float:
    return pair[1].token_s / pair[0].token_s


def report(pairs: list[tuple[Run, Run]], alone_tokens_per_s: float, bound: float) -> str:
    ratios = [_ratio(pair) for pair in pairs]
    error = 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    beside = statistics.median(pair[1].job_tokens_per_s for pair in pairs)
    rows = [
        ["a token of the stream, alone", f"{1000 * statistics.median(pair[0].token_s for pair in pairs):.1f} ms"],
        [
            "a token of the stream, beside the job",
            f"{1000 * statistics.median(pair[1].token_s for pair in pairs):.1f} ms",
        ],
        ["slowdown, mean of the pairs", f"{100 * (statistics.fmean(ratios) - 1):.1f} % +- {100 * error:.1f}"],
        ["slowdown, median of the pairs", f"{100 * (statistics.median(ratios) - 1):.1f} %"],
        ["bound", f"{100 * bound:.1f} %"],
        ["accepted drafts, alone and beside", f"{_acceptance(pairs, 0)}, {_acceptance(pairs, 1)}"],
        ["tokens/s of the job, beside the stream", f"{beside:.1f}"],
        ["tokens/s of the job, nothing else running", f"{alone_tokens_per_s:.1f}"],
        ["tokens/s of the stream, alone", f"{1 / statistics.median(pair[0].token_s for pair in pairs):.1f}"],
    ]
    return table(["", f"{len(pairs)} pairs"], rows)


def _acceptance(pairs: list[tuple[Run, Run]], index: int) -> str:
    return f"{100 * statistics.fmean(pair[index].acceptance for pair in pairs):.0f} %"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target", help="a model folder")
    parser.add_argument("--draft", type=Path, help="a model folder; without it, nothing is drafted")
    parser.add_argument("--pairs", type=int, default=10, help="of streams (default: 10)")
    parser.add_argument("--tokens", type=int, default=96, help="of a stream (default: 96)")
    parser.add_argument("--items", type=int, default=400, help="of a job (default: 400)")
    parser.add_argument("--item-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--prompt-repeats", type=int, default=1, help="makes prompts of items longer (default: 1)")
    parser.add_argument("--slots", type=int, default=8, help="sequences that run at once (default: 8)")
    parser.add_argument("--bound", type=float, default=0.05, help="jobs.max_live_slowdown (default: 0.05)")
    parser.add_argument("--name", default="job-slowdown", help="of the report (default: job-slowdown)")
    add_report_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="job-slowdown-") as folder:
        settings = local_settings(
            args.target,
            draft=LocalDraft(folder=args.draft) if args.draft else None,
            kv_cache=KvCacheSettings(device_bytes=512 << 20),
            scheduler=SchedulerSettings(max_num_seqs=args.slots, max_num_batched_tokens=256, max_model_len=1024),
            jobs=JobsSettings(path=folder, max_live_slowdown=args.bound),
        )
        with LocalDeployment(settings, gateway=True) as deployment:
            address = deployment.running.gateway_address
            with Client(address) as client, ControlClient(address) as control:
                bench = Bench(client, control, args)
                pairs = bench.pairs()
                alone_tokens_per_s = bench.job_alone()
    command = shlex.join(["python", "-m", "bench.job_slowdown", *sys.argv[1:]])
    publish(args.name, report(pairs, alone_tokens_per_s, args.bound), command=command, save=args.save)


if __name__ == "__main__":
    main()
