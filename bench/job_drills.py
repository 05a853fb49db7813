"""Whether jobs survive the death of what serves them, bit for bit.

A job is made of requests of all kinds: completions and conversations, at temperature 0 and 1, with several samples,
penalties, log-probabilities and structured output. The folder of jobs is copied before anything runs. One deployment
runs the original undisturbed. Another runs the copy, and at random moments, drawn from a seed, a process is killed:
gateway, scheduler or a rank of the target. The files of results must be equal, byte for byte. In float32, where what
runs beside a request changes nothing.

    python -m bench.job_drills --kills 50 --save

The exit status is 1 if a byte differs or a process is left.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.crowd import Born, left
from bench.report import add_report_options, publish, table
from cluster.deployment.settings import JobsSettings, KvCacheSettings, SchedulerSettings, Settings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from cluster.processes.status import State
from echelon import Client
from echelon.errors import UnavailableError
from echelon.jobs import Job, line_of
from gateway.jobs.folder import JobsFolder
from gateway.jobs.records import JobOrder
from gateway.jobs.store import JobStore

MODELS = Path(__file__).parents[1] / "models"
ROLES = ("gateway", "scheduler", "target")
PROMPTS = ("def quicksort(items):\n", "import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self")
_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 200}
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0, "frequency_penalty": 0.8},
    {"temperature": 1.0, "n": 3, "presence_penalty": 0.5},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "ignore_eos": False, "structured_outputs": {"json": _NUMBERS}},
)
_SEED = 11  # of the job
_HEALTHY_LIMIT_S = 120.0
_POLL_S = 0.05


def make_lines(number: int, num_tokens: int) -> list[str]:
    """Requests of all kinds in turns, none with a seed of its own; every tenth is one that is refused."""
    lines = []
    for index in range(number):
        body: dict[str, Any] = {"ignore_eos": True, "max_tokens": num_tokens, **_KINDS[index % len(_KINDS)]}
        prompt = PROMPTS[index % len(PROMPTS)]
        if index % 2 and "logprobs" not in body:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if index % 10 == 9:
            body["temperature"] = -1
        lines.append(json.dumps(line_of(index, body)))
    return lines


def submit(path: Path, lines: list[str]) -> str:
    """A job in a folder that no gateway has opened yet; its id."""
    folder = JobsFolder(path)
    assert folder.take(), "nobody else has it"
    store = JobStore(folder.store_path, time.time)
    upload = folder.upload()
    upload.write("\n".join(lines).encode())
    record = upload.finish("", "drill.jsonl", int(time.time()))
    store.add_file(record)
    order = JobOrder(
        owner="",
        input_file=record.id,
        input_sha256=record.sha256,
        endpoint="",
        window_s=86_400.0,
        window="24h",
        seed=_SEED,
    )
    job, _ = store.add_job(order)
    store.close()
    folder.release()
    return job.id


def settings_for(jobs: Path, args: argparse.Namespace) -> Settings:
    return local_settings(
        MODELS / "demo-target",
        tp_size=args.tp,
        draft=LocalDraft(folder=MODELS / "demo-draft") if args.draft else None,
        dtype="float32",  # what runs beside a request must not change a token
        kv_cache=KvCacheSettings(device_bytes=64 << 20),
        scheduler=SchedulerSettings(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512),
        jobs=JobsSettings(path=str(jobs)),
    )


@dataclass(slots=True, kw_only=True)
class Tally:
    kills: Counter[str] = field(default_factory=Counter)  # by role
    num_done: list[int] = field(default_factory=list)  # items that were recorded when each of them happened
    born: set[Born] = field(default_factory=set)


class Drill:
    """Kills in a deployment that runs a job."""

    def __init__(self, deployment: LocalDeployment, job_id: str, tally: Tally, rng: random.Random) -> None:
        self._deployment = deployment
        self._job_id = job_id
        self._tally = tally
        self._rng = rng

    async def run(self, num_kills: int) -> None:
        """Until the job has ended. The kills are spread over the items."""
        total = (await self._state()).num_items
        while not total:
            await asyncio.sleep(_POLL_S)
            total = (await self._state()).num_items
        moments = sorted(self._rng.uniform(0.0, 0.97) * total for _ in range(num_kills))
        async for job in self._states():
            self._note_pids()
            done = job.num_completed + job.num_failed
            if moments and done >= moments[0]:
                moments.pop(0)
                await self._kill(done)

    async def _kill(self, done: int) -> None:
        await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        role = self._rng.choice(ROLES)
        name, pid = self._rng.choice(self._processes(role))
        os.kill(pid, signal.SIGKILL)
        self._tally.kills[role] += 1
        self._tally.num_done.append(done)
        print(f"killed {name} after {done} items", file=sys.stderr)
        async with asyncio.timeout(_HEALTHY_LIMIT_S):
            while self._pid_of(name) == pid or self._deployment.state()[0] is not State.READY:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)

    async def _states(self) -> AsyncIterator[Job]:
        while True:
            job = await self._state()
            yield job
            if job.has_ended:
                return
            await asyncio.sleep(_POLL_S)

    async def _state(self) -> Job:
        while True:
            try:
                with Client(self._deployment.running.gateway_address) as client:
                    return await asyncio.to_thread(client.jobs.get, self._job_id)
            except UnavailableError:
                await asyncio.sleep(_POLL_S)

    def _processes(self, role: str) -> list[tuple[str, int]]:
        board = self._deployment.processes.read(lambda board: board.processes)
        return [(each.name, each.pid) for each in board if each.id.role == role and each.pid is not None]

    def _pid_of(self, name: str) -> int | None:
        return self._deployment.processes.read(lambda board: board.process(name).pid)

    def _note_pids(self) -> None:
        self._tally.born |= {Born.with_pid(pid) for role in (*ROLES, "draft") for _, pid in self._processes(role)}


def run_job(jobs: Path, job_id: str, num_kills: int, tally: Tally, args: argparse.Namespace) -> None:
    with LocalDeployment(settings_for(jobs, args), gateway=True) as deployment:
        asyncio.run(Drill(deployment, job_id, tally, random.Random(args.seed)).run(num_kills))


def results_of(path: Path, job_id: str) -> tuple[str, tuple[bytes, bytes]]:
    """The state of a job, and its two files, from the folder."""
    store = JobStore(path / "jobs.sqlite", time.time)
    job = store.job(job_id, None)
    assert job is not None, "it was submitted"
    files = [
        "".join(result.line + "\n" for result in store.results(job_id, -1, 1 << 40, is_error=is_error)).encode()
        for is_error in (False, True)
    ]
    store.close()
    return f"{job.status}, {job.completed} answers, {job.failed} errors", (files[0], files[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in one job (default: 50)")
    parser.add_argument("--items", type=int, default=400, help="of the job (default: 400)")
    parser.add_argument("--tokens", type=int, default=48, help="of each sample (default: 48)")
    parser.add_argument("--tp", type=int, default=1, help="ranks of the target (default: 1)")
    parser.add_argument("--draft", action="store_true", help="with a draft model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    add_report_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="job-drills-") as parent:
        calm, disturbed = Path(parent) / "calm", Path(parent) / "disturbed"
        job_id = submit(calm, make_lines(args.items, args.tokens))
        shutil.copytree(calm, disturbed)
        run_job(calm, job_id, 0, tally, args)
        run_job(disturbed, job_id, args.kills, tally, args)
        (state, expected), (state_after, got) = results_of(calm, job_id), results_of(disturbed, job_id)
    is_equal = expected == got and state == state_after
    remains = left(tally.born)
    kills = ", ".join(f"{number} {role}" for role, number in sorted(tally.kills.items()))
    rows = [["undisturbed", state, str(len(expected[0])), str(len(expected[1]))]]
    rows.append([f"killed: {kills}", state_after, str(len(got[0])), str(len(got[1]))])
    lines = [
        table(["", "job", "output bytes", "error bytes"], rows),
        "",
        f"The files are {'equal' if is_equal else 'NOT equal'}; {len(remains)} of {len(tally.born)} processes left.",
    ]
    command = shlex.join(["python", "-m", "bench.job_drills", *sys.argv[1:]])
    publish("job-drills", "\n".join(lines), command=command, save=args.save)
    return int(bool(remains) or not is_equal)


if __name__ == "__main__":
    sys.exit(main())
