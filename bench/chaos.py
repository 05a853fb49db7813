"""Whether streams survive the death of what serves them.

Many streams run at once, at temperature 0 and 1, with one sample and with three, some with penalties and
log-probabilities. At a random moment a process is killed (`kill`: SIGKILL) or stopped for good (`stop`: SIGSTOP). Every
stream is compared with the same stream undisturbed, in float32. Then the next moment comes, for each role in turn.

    python -m bench.chaos --kills 100 --save
    python -m bench.chaos --kills 3 --roles target --hows stop

The exit status is 1 if a token was lost, repeated or changed, a stream failed, or a process is left.
"""

import argparse
import asyncio
import os
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import add_report_options, publish, table
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from cluster.processes.status import State
from echelon import AsyncClient
from echelon.errors import EchelonError
from echelon.results import Completion

MODELS = Path(__file__).parents[1] / "models"
PROMPTS = ("def quicksort(items):\n", "import os\nimport sys\n\ndef main(", "class Stack:\n    def __init__(self")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
ROLES = ("draft", "target", "scheduler", "gateway")
_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 200}
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0, "frequency_penalty": 0.8},
    {"temperature": 1.0, "n": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "ignore_eos": False, "structured_output": {"json_schema": _NUMBERS}},
)
_MAX_MODEL_LEN = 512
_STREAM_LIMIT_S = 180.0  # a stream that takes longer has failed
_HEALTHY_LIMIT_S = 120.0
_POLL_S = 0.02
_GONE_LIMIT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request."""

    prompt: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a client saw of its stream."""

    samples: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    pause_s: float = 0.0  # the longest time between two chunks
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Damage:
    """Of streams, compared with the undisturbed ones; in tokens, but for the last two."""

    compared: int = 0
    lost: int = 0
    repeated: int = 0  # more than there should be
    changed: int = 0
    texts: int = 0  # samples whose text differs though their tokens do not
    failed: int = 0  # streams
    error: str = ""  # of the last of them

    @property
    def is_any(self) -> bool:
        return bool(self.lost or self.repeated or self.changed or self.texts or self.failed)

    def add(self, expected: Seen, got: Seen) -> None:
        if got.error:
            self.failed, self.error = self.failed + 1, got.error
            return
        for wanted, tokens in zip(expected.samples, got.samples, strict=True):
            self.compared += len(wanted)
            self.lost += max(0, len(wanted) - len(tokens))
            self.repeated += max(0, len(tokens) - len(wanted))
            self.changed += sum(a != b for a, b in zip(wanted, tokens, strict=False))
        self.texts += expected.samples == got.samples and expected.texts != got.texts


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of the losses of one role in one way."""

    damage: Damage = field(default_factory=Damage)
    pauses_s: list[float] = field(default_factory=list)  # of each stream
    healthy_s: list[float] = field(default_factory=list)  # from each loss until everything served again


def make_cases(number: int, num_tokens: int) -> list[Case]:
    """Requests of all kinds in turns, each with a seed of its own."""
    return [
        Case(
            prompt=PROMPTS[index % len(PROMPTS)],
            options={"ignore_eos": True, **_KINDS[index % len(_KINDS)], "seed": index, "max_tokens": num_tokens},
        )
        for index in range(number)
    ]


class Crowd:
    """All cases as streams at once."""

    def __init__(self, address: str, cases: Sequence[Case]) -> None:
        self._address = address
        self._cases = cases
        self.num_tokens = 0  # that have come so far
        self.most_tokens = sum(case.options["max_tokens"] * case.options.get("n", 1) for case in cases)

    def start(self) -> "asyncio.Task[list[Seen]]":
        self.num_tokens = 0
        return asyncio.create_task(self._run())

    async def _run(self) -> list[Seen]:
        async with AsyncClient(self._address, resume_within_s=_HEALTHY_LIMIT_S) as client:
            return list(await asyncio.gather(*(self._read(client, case) for case in self._cases)))

    async def wait_for_share(self, share: float) -> None:
        """Until this share of all tokens has come."""
        await _until(lambda: self.num_tokens >= share * self.most_tokens)

    async def _read(self, client: AsyncClient, case: Case) -> Seen:
        last_s, pause_s = time.monotonic(), 0.0
        try:
            async with client.stream(case.prompt, timeout_s=_STREAM_LIMIT_S, **case.options) as stream:
                async for chunk in stream:
                    now = time.monotonic()
                    last_s, pause_s = now, max(pause_s, now - last_s)
                    self.num_tokens += len(chunk.token_ids)
                return _seen(await stream.result(), pause_s)
        except EchelonError as err:
            return Seen(error=str(err))


def _seen(completion: Completion, pause_s: float) -> Seen:
    return Seen(
        samples=tuple(sample.token_ids for sample in completion.samples),
        texts=tuple(sample.text for sample in completion.samples),
        pause_s=pause_s,
    )


class Chaos:
    """Losses in a deployment that serves a crowd."""

    def __init__(self, deployment: LocalDeployment, cases: Sequence[Case], rng: random.Random) -> None:
        self._deployment = deployment
        self._crowd = Crowd(deployment.running.gateway_address, cases)
        self._rng = rng
        self._undisturbed: list[Seen] = []
        self.pids: set[int] = set()  # of all processes that ever ran

    async def observe(self) -> None:
        """Learn what the streams are when nothing happens. Raises EchelonError if one fails even then."""
        self._note_pids()
        self._undisturbed = await self._crowd.start()
        for seen in self._undisturbed:
            if seen.error:
                raise EchelonError(seen.error)

    async def lose(self, role: str, how: str, tally: Tally) -> None:
        """A process of this role is lost at a random moment; returns when all streams have ended and all is well."""
        streams = self._crowd.start()
        await self._crowd.wait_for_share(self._rng.uniform(0.05, 0.7))
        name, pid = self._rng.choice(self._processes(role))
        os.kill(pid, SIGNALS[how])
        lost_s = time.monotonic()
        await self._wait_until_healthy(name, pid)
        tally.healthy_s.append(time.monotonic() - lost_s)
        self._note_pids()
        for expected, got in zip(self._undisturbed, await streams, strict=True):
            tally.damage.add(expected, got)
            tally.pauses_s.append(got.pause_s)

    async def _wait_until_healthy(self, name: str, old_pid: int) -> None:
        """Until everything serves, with another process in the place of the lost one. Raises TimeoutError."""
        async with asyncio.timeout(_HEALTHY_LIMIT_S):
            await _until(lambda: self._pid_of(name) != old_pid and self._deployment.state()[0] is State.READY)

    def _processes(self, role: str) -> list[tuple[str, int]]:
        board = self._deployment.processes.read(lambda board: board.processes)
        return [(each.name, each.pid) for each in board if each.id.role == role and each.pid is not None]

    def _pid_of(self, name: str) -> int | None:
        return self._deployment.processes.read(lambda board: board.process(name).pid)

    def _note_pids(self) -> None:
        self.pids |= {pid for role in ROLES for _, pid in self._processes(role)}


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what changes is in other processes
        await asyncio.sleep(_POLL_S)


def left(pids: set[int]) -> set[int]:
    """Those that still run some time after their deployment has ended."""
    deadline = time.monotonic() + _GONE_LIMIT_S
    while (running := {pid for pid in pids if _is_running(pid)}) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return running


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def torment(chaos: Chaos, args: argparse.Namespace) -> dict[tuple[str, str], Tally]:
    """Every role in every way, in turns."""
    tallies = {(role, how): Tally() for role in args.roles for how in args.hows}
    await chaos.observe()
    for number in range(args.kills):
        for (role, how), tally in tallies.items():
            await chaos.lose(role, how, tally)
            print(f"{number + 1}: {role} {how}: {tally.healthy_s[-1]:.1f} s, {tally.damage}", file=sys.stderr)
    return tallies


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def report(tallies: dict[tuple[str, str], Tally]) -> str:
    rows = []
    for (role, how), tally in tallies.items():
        damage, pauses, healthy = tally.damage, tally.pauses_s, tally.healthy_s
        rows.append(
            [
                f"{role}, {how}",
                str(len(healthy)),
                str(damage.compared),
                *(
                    str(number)
                    for number in (damage.lost, damage.repeated, damage.changed + damage.texts, damage.failed)
                ),
                f"{statistics.median(pauses):.2f} / {percentile(pauses, 0.99):.2f}",
                f"{statistics.median(healthy):.2f} / {max(healthy):.2f}",
            ]
        )
    header = ["lost", "times", "tokens", "lost", "repeated", "changed", "streams failed"]
    return table([*header, "pause p50 / p99 (s)", "healthy after p50 / max (s)"], rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="losses of each role in each way (default: 3)")
    parser.add_argument("--streams", type=int, default=32, help="that run at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=48, help="of each sample (default: 48)")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--hows", nargs="+", choices=SIGNALS, default=tuple(SIGNALS))
    parser.add_argument("--tp", type=int, default=2, help="ranks of the target (default: 2)")
    parser.add_argument("--colocated", action="store_true", help="the draft lives in the target's process")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    add_report_options(parser)
    args = parser.parse_args()
    if args.colocated:
        args.roles = [role for role in args.roles if role != "draft"]
    return args


def main() -> int:
    args = parse_args()
    settings = local_settings(
        MODELS / "demo-target",
        tp_size=args.tp,
        draft=LocalDraft(folder=MODELS / "demo-draft", colocated=args.colocated),
        dtype="float32",  # a prompt that is computed again in other chunks must not change a token
        kv_cache=KvCacheSettings(device_bytes=64 << 20),
        scheduler=SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=_MAX_MODEL_LEN),
    )
    with LocalDeployment(settings, gateway=True) as deployment:
        chaos = Chaos(deployment, make_cases(args.streams, args.tokens), random.Random(args.seed))
        tallies = asyncio.run(torment(chaos, args))
    remains = left(chaos.pids)
    lines = [
        report(tallies),
        "",
        f"{args.streams} streams at once; {len(remains)} of {len(chaos.pids)} processes are left.",
    ]
    command = shlex.join(["python", "-m", "bench.chaos", *sys.argv[1:]])
    publish("chaos", "\n".join(lines), command=command, save=args.save)
    return int(bool(remains) or any(tally.damage.is_any for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
