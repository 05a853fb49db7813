"""How long a stream pauses when a rank of its target is killed, with spares and without.

Both kinds of deployment of the demo pair run side by side. Ranks are killed in turns, each as soon as its deployment is
ready again and, where there are spares, these are. A pause is the longest time without a token after SIGKILL: a few
tokens are still under way then.

    python -m bench.spares --kills 8 --save
"""

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from bench.chaos import drill_settings
from bench.crowd import until
from bench.report import Spread, add_report_options, publish, table
from cluster.local import LocalDeployment
from cluster.processes.status import ProcessStatus, State
from echelon import AsyncClient

_LIMIT_S = 300.0
_STABLE_S = 10.5  # a part that is lost again sooner is started after a delay
_TOKENS_BEFORE = 8
_TOKENS = 400


@dataclass(slots=True, kw_only=True)
class Subject:
    """One deployment, and what its streams have gone through."""

    title: str
    deployment: LocalDeployment
    pauses_s: list[float] = field(default_factory=list)
    num_changed: int = 0

    def ranks(self) -> list[ProcessStatus]:
        board = self.deployment.processes.read(lambda board: board.processes)
        return [each for each in board if each.id.role == "target"]

    def is_calm(self) -> bool:
        has_spares = self.deployment.settings.spares == 0 or all(rank.spare == "ready" for rank in self.ranks())
        return has_spares and self.deployment.state()[0] is State.READY

    async def lose(self, number: int, undisturbed: list[int] | None) -> list[int]:
        """Kill a rank in the middle of a stream, if there is something to compare it with; the stream's tokens."""
        async with AsyncClient(self.deployment.running.gateway_address) as client:
            stream = client.stream("def main():\n", max_tokens=_TOKENS, temperature=1.0, seed=7, ignore_eos=True)
            tokens: list[int] = []
            silences_s: list[float] = []
            heard_s = 0.0
            async with stream:
                async for chunk in stream:
                    if heard_s:
                        silences_s.append(time.monotonic() - heard_s)
                        heard_s = time.monotonic()
                    tokens += chunk.token_ids
                    if undisturbed is not None and not heard_s and len(tokens) >= _TOKENS_BEFORE:
                        self._kill_rank(number)
                        heard_s = time.monotonic()
        if undisturbed is not None:
            self.pauses_s.append(max(silences_s))
            self.num_changed += tokens != undisturbed
        return tokens

    def _kill_rank(self, number: int) -> None:
        ranks = self.ranks()
        pid = ranks[number % len(ranks)].pid
        assert pid is not None, "a rank that computes is alive"
        os.kill(pid, signal.SIGKILL)


async def until_calm(subjects: list[Subject]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        await until(lambda: all(subject.is_calm() for subject in subjects))
    await asyncio.sleep(_STABLE_S)


async def measure(subjects: list[Subject], kills: int) -> None:
    await until_calm(subjects)
    undisturbed = await subjects[0].lose(0, None)
    for number in range(kills):
        await until_calm(subjects)
        for subject in subjects:
            await subject.lose(number, undisturbed)
            print(f"{number + 1}: {subject.title}: {subject.pauses_s[-1]:.2f} s", file=sys.stderr, flush=True)


def started(stack: ExitStack) -> Iterator[Subject]:
    settings = drill_settings(tp=2)
    for title, given in (("no spares", replace(settings, spares=0)), ("spares", settings)):
        yield Subject(title=title, deployment=stack.enter_context(LocalDeployment(given, gateway=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="of each deployment (default: 8)")
    add_report_options(parser)
    args = parser.parse_args()
    with ExitStack() as stack:
        subjects = list(started(stack))
        asyncio.run(measure(subjects, args.kills))
    rows = [
        [subject.title, str(len(subject.pauses_s)), f"{Spread.of(subject.pauses_s):.2f}", str(subject.num_changed)]
        for subject in subjects
    ]
    body = table(["", "kills", "pause (s): median (least-most)", "changed streams"], rows)
    publish("spares", body, command=shlex.join(["python", "-m", "bench.spares", *sys.argv[1:]]), save=args.save)
    return int(any(subject.num_changed for subject in subjects))


if __name__ == "__main__":
    sys.exit(main())
