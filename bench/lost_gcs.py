"""Whether a deployment outlives Ray's GCS, if an external Redis keeps what the GCS knows.

On a Ray of one node, the GCS is killed under live streams and started again over the same Redis, at the same port. Then
a target and the controller are killed: both must come back as ever. Every stream is compared with the same stream
undisturbed, in float32. Needs redis-server.

    python -m bench.lost_gcs --away 10 --save

The exit status is 1 if a token was lost, repeated or changed, or a stream failed.
"""

import argparse
import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from bench.chaos import drill_settings
from bench.crowd import Crowd, Damage, make_cases
from bench.lost_nodes import Deployed, Nodes, deployed
from bench.report import add_report_options, publish, table
from cluster.on_ray.cluster import find_controller
from cluster.processes.status import DeploymentStatus, State

_START_LIMIT_S = 300.0


@contextmanager
def external_redis() -> Iterator[None]:
    """Inside, a head that is started keeps what its GCS knows in a Redis of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    os.environ["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        yield
    finally:
        server.terminate()
        server.wait()


class Gcs:
    """Of a head; it can be started again as it was."""

    def __init__(self, pid: int, port: str) -> None:
        self._pid = pid
        arguments, environment = (_strings(Path(f"/proc/{pid}/{name}")) for name in ("cmdline", "environ"))
        self._arguments = [_at_port(argument, port) for argument in arguments]
        self._environment = dict(each.split("=", 1) for each in environment if "=" in each)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def start(self) -> None:
        self._pid = subprocess.Popen(self._arguments, env=self._environment, stdout=subprocess.DEVNULL).pid


def _strings(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\0")[:-1]


def _at_port(argument: str, port: str) -> str:
    return f"--gcs_server_port={port}" if argument.startswith("--gcs_server_port=") else argument


def _pids(status: DeploymentStatus) -> dict[str, int | None]:
    return {process.name: process.pid for process in status.processes}


async def torment(gcs: Gcs, deployment: Deployed, args: argparse.Namespace) -> tuple[Damage, list[list[str]]]:
    crowd, damage = Crowd(deployment.status().endpoint, make_cases(args.streams, args.tokens)), Damage()
    await crowd.observe()
    before = _pids(deployment.status())
    async with crowd.running():
        await crowd.wait_for_tokens(crowd.most_tokens() // 4)
        gcs.kill()
        num_tokens = crowd.num_tokens
        await asyncio.sleep(args.away)
        meanwhile = crowd.num_tokens - num_tokens
        gcs.start()
        now = _pids(await deployment.until_ready())
        target_s = await _lose_target(deployment, now["target-0.0"])
        controller_s = await _lose_controller(deployment)
        await crowd.wait_for_tokens(crowd.most_tokens())
        crowd.take_ended(damage)
    return damage, [
        ["tokens while the GCS was away", str(meanwhile)],
        ["processes that changed with the GCS", str(sum(before[name] != pid for name, pid in now.items()))],
        ["a target that was killed then is up again after (s)", f"{target_s:.1f}"],
        ["a controller that was killed then has taken over after (s)", f"{controller_s:.1f}"],
        ["tokens compared", str(damage.compared)],
        ["lost / repeated / changed", f"{damage.lost} / {damage.repeated} / {damage.changed + damage.texts}"],
        ["streams failed", str(damage.failed)],
    ]


async def _lose_target(deployment: Deployed, pid: int | None) -> float:
    assert pid is not None, "it is ready"
    os.kill(pid, signal.SIGKILL)
    lost_s = time.monotonic()
    await deployment.until(
        lambda status: status.state is State.READY and _pids(status)["target-0.0"] not in (None, pid)
    )
    return time.monotonic() - lost_s


async def _lose_controller(deployment: Deployed) -> float:
    ray.kill(find_controller(deployment.record.name), no_restart=False)
    lost_s = time.monotonic()
    await deployment.until(lambda status: any(event.part == "controller" for event in status.events))
    return time.monotonic() - lost_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--away", type=float, default=10.0, help="seconds without a GCS (default: 10)")
    parser.add_argument("--streams", type=int, default=7, help="that run at once (default: 7)")
    parser.add_argument("--tokens", type=int, default=24, help="of each sample (default: 24)")
    add_report_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, external_redis():
        os.environ["ECHELON_STATE_DIR"] = folder
        nodes = Nodes(2)
        try:
            gcs = Gcs(nodes.gcs_pid, nodes.address.rpartition(":")[2])
            settings = replace(drill_settings(tp=1), startup_timeout_s=_START_LIMIT_S)
            with deployed(nodes, settings) as deployment:
                damage, rows = asyncio.run(torment(gcs, deployment, args))
        finally:
            nodes.shut_down()
            gcs.kill()
    command = shlex.join(["python", "-m", "bench.lost_gcs", *sys.argv[1:]])
    publish("lost_gcs", table(["what", "value"], rows), command=command, save=args.save)
    return int(damage.is_any)


if __name__ == "__main__":
    sys.exit(main())
