"""Noise and senseless messages at every port of a deployment, for as long as you like, while it streams.

    python -m tests.property.hostile_ports --seconds 30 --seed 1

prints for each process how long a stream waited between two chunks while its ports were attacked, and without attack. A
fault is a process that ends, a stream that fails, or a different token.
"""

import argparse
import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from childproc.wires import open_blocking_channel
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from cluster.processes.status import ProcessStatus
from echelon import Client
from echelon.errors import EchelonError
from tests.helpers.hostile import garbled_call, knock
from tests.helpers.listening import listening_sockets

_MODELS = Path(__file__).parents[2] / "models"
_REQUEST: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
_PROMPT = "def quicksort(items):\n"
_MAX_HELD = 100  # connections that are left open


@dataclass
class Victim:
    """Streams again and again, and records what goes wrong."""

    client: Client
    expected: tuple[int, ...]
    gaps_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self._stream()
            except EchelonError as err:
                self.faults.append(str(err))

    def _stream(self) -> None:
        token_ids: list[int] = []
        with self.client.stream(_PROMPT, **_REQUEST) as stream:
            before = time.monotonic()
            for chunk in stream:
                self.gaps_s.append(time.monotonic() - before)
                before = time.monotonic()
                token_ids += chunk.token_ids
        if tuple(token_ids) != self.expected:
            self.faults.append("other tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each process")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    settings = local_settings(
        _MODELS / "demo-target",
        tp_size=2,
        draft=LocalDraft(folder=_MODELS / "demo-draft"),
        kv_cache=KvCacheSettings(device_bytes=32 << 20),
        scheduler=SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=512),
    )
    rng = random.Random(options.seed)
    with LocalDeployment(settings, gateway=True) as deployment, Client(deployment.running.gateway_address) as client:
        victim = Victim(client, client.generate(_PROMPT, **_REQUEST).token_ids)
        processes = deployment.processes.read(lambda board: board.processes)
        _watch(victim, "nobody", options.seconds, lambda: time.sleep(0.01))
        for process in processes:
            assert process.pid is not None, "it runs"
            doors = sorted(listening_sockets([process.pid]))
            if not doors:
                print(f"{process.name:14} listens nowhere")
                continue
            with contextlib.ExitStack() as stack:
                _watch(victim, process.name, options.seconds, _attack(process, doors, rng, stack))
        if deployment.processes.read(lambda board: board.processes) != processes:
            victim.faults.append("a process has ended")
    print(*victim.faults, sep="\n")
    sys.exit(bool(victim.faults))


def _attack(
    process: ProcessStatus, doors: Sequence[tuple[str, int]], rng: random.Random, stack: contextlib.ExitStack
) -> Callable[[], None]:
    channel = stack.enter_context(open_blocking_channel(process.address)) if process.address else None
    num_held = 0

    def attack() -> None:
        nonlocal num_held
        if channel is not None and rng.random() < 0.1:
            garbled_call(channel, rng)
            return
        connection = knock(rng.choice(doors), rng)
        if num_held < _MAX_HELD:
            num_held += 1
            stack.enter_context(connection)
        else:
            connection.close()

    return attack


def _watch(victim: Victim, name: str, seconds: float, attack: Callable[[], None]) -> None:
    victim.gaps_s.clear()
    over = threading.Event()
    streaming = threading.Thread(target=victim.run, args=(over,))
    streaming.start()
    num_attacks, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        attack()
        num_attacks += 1
    over.set()
    streaming.join()
    gaps_ms = sorted(1e3 * gap_s for gap_s in victim.gaps_s)
    p50, p99 = (gaps_ms[len(gaps_ms) * percent // 100] for percent in (50, 99))
    attacks = f"{name:14} {num_attacks:6} attacks"
    print(f"{attacks}, between chunks: {p50:5.0f} ms p50, {p99:5.0f} ms p99, {gaps_ms[-1]:5.0f} ms at most", flush=True)


if __name__ == "__main__":
    main()
