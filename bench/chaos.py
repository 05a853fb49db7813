"""Whether streams survive the death of what serves them.

Many streams run all the time, at temperature 0 and 1, with one sample and with three, some with penalties,
log-probabilities or a grammar. At a random moment a process is killed (`kill`: SIGKILL) or stopped for good (`stop`:
SIGSTOP). Every stream is compared with the same stream undisturbed, in float32. Once all is well again and streams are
as fast as before, the next moment comes, for each role in turn.

    python -m bench.chaos --kills 100 --save
    python -m bench.chaos --kills 3 --roles target --hows stop
    python -m bench.chaos --minutes 30 --save

The exit status is 1 if a token was lost, repeated or changed, a stream failed, a request was refused while the gateway
lived, or a process is left.
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
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.crowd import Born, Case, Crowd, Damage, left, make_cases, until
from bench.health_watch import HealthWatch, right_after_s
from bench.report import add_report_options, publish, table
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings, ServerSettings, Settings
from cluster.local import LOCAL_SERVER, LocalDeployment, LocalDraft, local_settings
from cluster.processes.status import State

MODELS = Path(__file__).parents[1] / "models"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
ROLES = ("draft", "target", "scheduler", "gateway")
_MAX_MODEL_LEN = 512
_HEALTHY_LIMIT_S = 120.0
_SPEED_LIMIT_S = 60.0  # after it is healthy
_SPEED_WINDOW_S = 2.0
_FULL_SPEED = 0.8  # of the rate before: the rest is how the rate varies anyway
_NUM_RATES = 5


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of the losses of one role in one way. Times are from each loss."""

    damage: Damage = field(default_factory=Damage)
    pauses_s: list[float] = field(default_factory=list)  # of each stream that ran at the loss
    healthy_s: list[float] = field(default_factory=list)  # until everything served again
    right_s: list[float] = field(default_factory=list)  # until the gateway's health was right from then on
    speed_s: list[float] = field(default_factory=list)  # until tokens came as fast as before


class Chaos:
    """Losses in a deployment that serves a crowd."""

    def __init__(self, deployment: LocalDeployment, cases: Sequence[Case], rng: random.Random) -> None:
        self._deployment = deployment
        self.crowd = Crowd(deployment.running.gateway_address, cases)
        self._health = HealthWatch(deployment.running.gateway_address)
        self._rng = rng
        self._rates: deque[float] = deque(maxlen=_NUM_RATES)
        self.born: set[Born] = set()  # all processes that ever ran

    async def observe(self) -> None:
        """Learn what the streams are when nothing happens. Raises EchelonError if one fails even then."""
        self._note_pids()
        await self.crowd.observe()

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Inside, streams run."""
        async with self._health.watching(), self.crowd.running():
            yield

    async def lose(self, role: str, how: str, tally: Tally) -> float:
        """A process of this role is lost at a random moment; returns when all streams of that moment have ended and all
        is well. When it was lost."""
        await self.crowd.wait_for_tokens(round(self._rng.uniform(0.05, 0.7) * self.crowd.most_tokens()))
        self._rates.append(self.crowd.rate(_SPEED_WINDOW_S))
        name, pid = self._rng.choice(self._processes(role))
        os.kill(pid, SIGNALS[how])
        lost_s = time.monotonic()
        await self._wait_until_healthy(name, pid)
        tally.healthy_s.append(time.monotonic() - lost_s)
        self._note_pids()
        await self.crowd.wait_until_ended(lost_s)
        ended = self.crowd.take_ended(tally.damage)
        tally.pauses_s += [seen.pause_s for seen in ended if seen.began_s <= lost_s]
        return lost_s

    async def recover(self, lost_s: float, tally: Tally) -> None:
        """Until streams are as fast as before the loss, or that takes too long."""
        deadline = time.monotonic() + _SPEED_LIMIT_S
        wanted = _FULL_SPEED * statistics.median(self._rates)
        await until(lambda: self.crowd.rate(_SPEED_WINDOW_S) >= wanted or time.monotonic() > deadline)
        tally.speed_s.append(max(0.0, time.monotonic() - _SPEED_WINDOW_S - lost_s))
        tally.right_s.append(right_after_s(lost_s, self.crowd.silence(lost_s), self._health.samples))
        self._health.samples.clear()

    async def _wait_until_healthy(self, name: str, old_pid: int) -> None:
        """Until everything serves, with another process in the place of the lost one. Raises TimeoutError."""
        async with asyncio.timeout(_HEALTHY_LIMIT_S):
            await until(lambda: self._pid_of(name) != old_pid and self._deployment.state()[0] is State.READY)

    def _processes(self, role: str) -> list[tuple[str, int]]:
        board = self._deployment.processes.read(lambda board: board.processes)
        return [(each.name, each.pid) for each in board if each.id.role == role and each.pid is not None]

    def _pid_of(self, name: str) -> int | None:
        return self._deployment.processes.read(lambda board: board.process(name).pid)

    def _note_pids(self) -> None:
        self.born |= {Born.with_pid(pid) for role in ROLES for _, pid in self._processes(role)}


async def torment(chaos: Chaos, args: argparse.Namespace) -> dict[tuple[str, str], Tally]:
    """Every role in every way, in turns."""
    tallies = {(role, how): Tally() for role in args.roles for how in args.hows}
    await chaos.observe()
    end_s = time.monotonic() + 60.0 * args.minutes
    async with chaos.load():
        for number in range(args.kills):
            for (role, how), tally in tallies.items():
                if time.monotonic() > end_s:
                    return tallies
                await chaos.recover(await chaos.lose(role, how, tally), tally)
                print(_progress(f"{number + 1}: {role} {how}", tally), file=sys.stderr, flush=True)
    return tallies


def _progress(title: str, tally: Tally) -> str:
    times = f"healthy {tally.healthy_s[-1]:.1f} s, full speed {tally.speed_s[-1]:.1f} s"
    return f"{title}: {times}, health right {tally.right_s[-1]:.1f} s, {tally.damage}"


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def report(tallies: dict[tuple[str, str], Tally]) -> str:
    rows = []
    for (role, how), tally in tallies.items():
        damage, pauses = tally.damage, tally.pauses_s
        if not tally.healthy_s:
            continue
        changed = damage.changed + damage.texts + damage.logprobs
        counts = (
            len(tally.healthy_s),
            damage.compared,
            damage.lost,
            damage.repeated,
            changed,
            damage.failed,
            damage.refused,
        )
        rows.append(
            [
                f"{role}, {how}",
                *map(str, counts),
                f"{statistics.median(pauses):.2f} / {percentile(pauses, 0.99):.2f}",
                *(
                    f"{statistics.median(times):.2f} / {max(times):.2f}"
                    for times in (tally.healthy_s, tally.right_s, tally.speed_s)
                ),
            ]
        )
    header = [
        "lost",
        "times",
        "tokens",
        "lost",
        "repeated",
        "changed",
        "streams failed",
        "requests refused",
        "pause p50 / p99 (s)",
    ]
    times = ("healthy", "health right", "full speed")
    return table([*header, *(f"{time} after p50 / max (s)" for time in times)], rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=None, help="losses of each role in each way (default: 3)")
    parser.add_argument("--minutes", type=float, default=None, help="no loss after so long")
    parser.add_argument("--streams", type=int, default=32, help="that run at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=48, help="of each sample (default: 48)")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--hows", nargs="+", choices=SIGNALS, default=tuple(SIGNALS))
    parser.add_argument("--tp", type=int, default=2, help="ranks of the target (default: 2)")
    parser.add_argument("--colocated", action="store_true", help="the draft lives in the target's process")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    add_report_options(parser)
    args = parser.parse_args()
    if args.kills is None:
        args.kills = 3 if args.minutes is None else sys.maxsize
    if args.minutes is None:
        args.minutes = float("inf")
    if args.colocated:
        args.roles = [role for role in args.roles if role != "draft"]
    return args


def drill_settings(*, tp: int, colocated: bool = False, server: ServerSettings = LOCAL_SERVER) -> Settings:
    """The demo pair, with spares as a deployment file has them by default."""
    return local_settings(
        MODELS / "demo-target",
        tp_size=tp,
        draft=LocalDraft(folder=MODELS / "demo-draft", colocated=colocated),
        dtype="float32",  # a prompt that is computed again in other chunks must not change a token
        kv_cache=KvCacheSettings(device_bytes=64 << 20),
        scheduler=SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=_MAX_MODEL_LEN),
        server=server,
        spares="auto",
    )


def main() -> int:
    args = parse_args()
    settings = drill_settings(tp=args.tp, colocated=args.colocated)
    with LocalDeployment(settings, gateway=True) as deployment:
        chaos = Chaos(deployment, make_cases(args.streams, args.tokens), random.Random(args.seed))
        tallies = asyncio.run(torment(chaos, args))
    remains = left(chaos.born)
    lines = [
        report(tallies),
        "",
        f"{args.streams} streams at once; {len(remains)} of {len(chaos.born)} processes are left.",
    ]
    command = shlex.join(["python", "-m", "bench.chaos", *sys.argv[1:]])
    publish("chaos", "\n".join(lines), command=command, save=args.save)
    refused = any(tally.damage.refused for (role, _), tally in tallies.items() if role != "gateway")
    return int(bool(remains) or refused or any(tally.damage.is_any for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
