"""Whether streams survive the death of a node.

A Ray of several nodes on this machine has a deployment, which is under load all the time. A node is killed with SIGKILL
as a whole: its raylet, the hosts and their processes. Every stream is compared with the same stream undisturbed, in
float32. Then an equal node comes.

    python -m bench.lost_nodes --times 10 --save

The exit status is 1 if a token was lost, repeated or changed, or a stream failed.
"""

import argparse
import asyncio
import logging
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from bench.chaos import drill_settings
from bench.crowd import Crowd, Damage, make_cases
from bench.report import add_report_options, publish, table
from cluster.deployment.settings import Settings
from cluster.on_ray import lifecycle
from cluster.on_ray.cluster import NAMESPACE
from cluster.processes.status import DeploymentStatus, State
from cluster.state_dir import Record

_LIMIT_S = 300.0
_NUM_CPUS = 2  # of each node: a target and a draft
_END_GRACE_S = 5.0
_POLL_S = 0.2


class Nodes:
    """A Ray of nodes with so many CPUs each; the first is its head."""

    def __init__(self, *num_cpus: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus[0]})
        self._others = [self._cluster.add_node(num_cpus=number) for number in num_cpus[1:]]
        self.address: str = self._cluster.address
        ray.init(address=self.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)

    @property
    def gcs_pid(self) -> int:
        return int(self._cluster.head_node.all_processes["gcs_server"][0].process.pid)

    def add(self, num_cpus: int) -> None:
        self._others.append(self._cluster.add_node(num_cpus=num_cpus))

    def kill(self) -> str:
        """The node that came last, and all its processes; its id."""
        node = self._others.pop()
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in [raylet, *_descendants(raylet)]:
            os.kill(pid, signal.SIGKILL)
        return str(node.node_id)

    def shut_down(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


def _descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return [each for child in children for each in [child, *_descendants(child)]]


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


@contextmanager
def deployed(nodes: Nodes, settings: Settings) -> Iterator["Deployed"]:
    record = Record(name=settings.name, ray_address=nodes.address)
    try:
        lifecycle.deploy(record, settings, on_plan=lambda _: None, on_change=lambda _: None)
        yield Deployed(record)
    finally:
        lifecycle.end(record, _END_GRACE_S)


@dataclass(frozen=True, slots=True)
class Deployed:
    record: Record

    def status(self) -> DeploymentStatus:
        return lifecycle.status_of(self.record)

    async def until(self, holds: Callable[[DeploymentStatus], bool]) -> DeploymentStatus:
        """Raises TimeoutError that holds the last status."""
        deadline = time.monotonic() + _LIMIT_S
        while True:
            status = await asyncio.to_thread(self.status)
            if holds(status):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"{status.state}: {status.reason}; {[event.text for event in status.events]}")
            await asyncio.sleep(_POLL_S)

    async def until_ready(self) -> DeploymentStatus:
        return await self.until(lambda status: status.state is State.READY)


def places(status: DeploymentStatus) -> dict[str, str]:
    """The node of each process, by name, as the plan has it."""
    assert status.plan is not None
    return {process.name: process.node_id for process in status.plan.processes}


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of all losses. Times are from each loss, or from when an equal node had come."""

    damage: Damage = field(default_factory=Damage)
    pauses_s: list[float] = field(default_factory=list)  # of each stream that ran at the loss
    noticed_s: list[float] = field(default_factory=list)  # until `status` named the node
    whole_s: list[float] = field(default_factory=list)  # since the node was back


async def drill(nodes: Nodes, deployment: Deployed, crowd: Crowd, tally: Tally) -> None:
    """The node that came last is lost under load, and an equal one comes."""
    await crowd.wait_for_tokens(crowd.most_tokens() // 4)
    lost = nodes.kill()
    lost_s = time.monotonic()
    await deployment.until(lambda status: status.state is not State.READY and f"node {lost[:8]}" in status.reason)
    tally.noticed_s.append(time.monotonic() - lost_s)
    await crowd.wait_until_ended(lost_s)
    nodes.add(_NUM_CPUS)
    back_s = time.monotonic()
    await deployment.until_ready()
    tally.whole_s.append(time.monotonic() - back_s)
    ended = crowd.take_ended(tally.damage)
    tally.pauses_s += [seen.pause_s for seen in ended if seen.began_s <= lost_s]
    print(f"noticed {tally.noticed_s[-1]:.1f} s, whole {tally.whole_s[-1]:.1f} s, {tally.damage}", file=sys.stderr)


async def torment(nodes: Nodes, deployment: Deployed, args: argparse.Namespace) -> Tally:
    crowd, tally = Crowd(deployment.status().endpoint, make_cases(args.streams, args.tokens)), Tally()
    await crowd.observe()
    async with crowd.running():
        for _ in range(args.times):
            await drill(nodes, deployment, crowd, tally)
    return tally


def report(tally: Tally) -> str:
    damage = tally.damage
    changed = damage.changed + damage.texts + damage.logprobs
    rows = [
        ["nodes lost", str(len(tally.noticed_s))],
        ["tokens compared", str(damage.compared)],
        ["lost / repeated / changed", f"{damage.lost} / {damage.repeated} / {changed}"],
        ["streams failed", str(damage.failed)],
        ["pause of a stream p50 / max (s)", _times(tally.pauses_s)],
        ["status names the node after p50 / max (s)", _times(tally.noticed_s)],
        ["whole again after an equal node came p50 / max (s)", _times(tally.whole_s)],
    ]
    return table(["what", "value"], rows)


def _times(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} / {max(values):.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="a node is lost (default: 3)")
    parser.add_argument("--streams", type=int, default=7, help="that run at once (default: 7)")
    parser.add_argument("--tokens", type=int, default=32, help="of each sample (default: 32)")
    add_report_options(parser)
    args = parser.parse_args()
    settings = replace(drill_settings(tp=1), num_replicas=2, max_replicas=2, startup_timeout_s=_LIMIT_S)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ECHELON_STATE_DIR"] = folder
        nodes = Nodes(_NUM_CPUS, _NUM_CPUS)
        try:
            with deployed(nodes, settings) as deployment:
                tally = asyncio.run(torment(nodes, deployment, args))
        finally:
            nodes.shut_down()
    text = f"Two replicas of a target and a draft, on two Ray nodes of one machine.\n\n{report(tally)}"
    command = shlex.join(["python", "-m", "bench.lost_nodes", *sys.argv[1:]])
    publish("lost_nodes", text, command=command, save=args.save)
    return int(tally.damage.is_any)


if __name__ == "__main__":
    sys.exit(main())
