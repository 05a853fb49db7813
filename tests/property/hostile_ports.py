"""Noise and senseless messages at every port of a deployment, for as long as you like, while it streams.

    python -m tests.property.hostile_ports --seconds 30 --seed 1
    python -m tests.property.hostile_ports --messages 10000 --seed 1

The first prints for each process how long a stream waited between two chunks while its ports were attacked, and without
attack. The second sends so many messages to each port inside the deployment with a certificate of it, and as many
without. A fault is a process that ends, a stream that fails, a different token, a block of the KV cache that is held
although nothing runs, and an answer to somebody without a certificate.
"""

import argparse
import contextlib
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.soak import num_held_blocks
from childproc.wires import open_blocking_channel
from cluster.authority import Authority
from cluster.deployment.settings import KvCacheSettings, SchedulerSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from cluster.processes.status import ProcessStatus
from echelon import Client
from echelon.errors import EchelonError
from echelon.pb.process_pb2 import ProcessIdentity
from tests.helpers.fuzzed_ports import Strangers, send_with_certificate
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
    parser.add_argument("--messages", type=int, help="to each port inside, twice, instead of noise for some time")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    settings = local_settings(
        _MODELS / "demo-target",
        tp_size=2,
        draft=LocalDraft(folder=_MODELS / "demo-draft"),
        kv_cache=KvCacheSettings(device_bytes=32 << 20),
        scheduler=SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=512),
    )
    rng, authority = random.Random(options.seed), Authority.create("attacked")
    deployment = LocalDeployment(settings, gateway=True, authority=authority)
    with deployment, Client(deployment.running.gateway_address) as client:
        victim = Victim(client, client.generate(_PROMPT, **_REQUEST).token_ids)
        processes = deployment.processes.read(lambda board: board.processes)
        if options.messages is None:
            _make_noise(victim, processes, options.seconds, rng, authority)
        else:
            _fuzz(victim, processes, options.messages, rng, authority)
        if deployment.processes.read(lambda board: board.processes) != processes:
            victim.faults.append("a process has ended")
        scheduler = deployment.running.replicas[0].scheduler_address
        if held := num_held_blocks(scheduler, authority.issue("attacker")):
            victim.faults.append(f"{held} blocks are held")
    print(*victim.faults, sep="\n")
    print(f"{len(victim.faults)} faults")
    sys.exit(bool(victim.faults))


def _make_noise(
    victim: Victim, processes: Sequence[ProcessStatus], seconds: float, rng: random.Random, authority: Authority
) -> None:
    _watch(victim, "nobody", _for(seconds, lambda: time.sleep(0.01)))
    for process in processes:
        assert process.pid is not None, "it runs"
        doors = sorted(listening_sockets([process.pid]))
        if not doors:
            print(f"{process.name:14} listens nowhere")
            continue
        with contextlib.ExitStack() as stack:
            attack = _attack(process, doors, rng, stack, authority.issue("attacker"))
            _watch(victim, process.name, _for(seconds, attack))


def _fuzz(
    victim: Victim, processes: Sequence[ProcessStatus], number: int, rng: random.Random, authority: Authority
) -> None:
    strangers = Strangers()
    for process in processes:
        if not process.address or process.id.role == "gateway":
            continue  # `fuzzed_doors` sends messages to the public ports
        host, port = process.address.rsplit(":", 1)
        with open_blocking_channel(process.address, identity=authority.issue("attacker")) as channel:
            ends: Counter[str] = Counter()
            _watch(victim, process.name, lambda: _send(channel, number, rng, ends))  # noqa: B023  # runs at once
        print("  with a certificate: " + ", ".join(f"{end} {count}" for end, count in ends.most_common()))
        _watch(victim, process.name, lambda: _send_as(strangers, victim, (host, int(port)), number, rng))  # noqa: B023


def _send(channel: grpc.Channel, number: int, rng: random.Random, ends: Counter[str]) -> int:
    ends += send_with_certificate(channel, number, rng)
    return number


def _send_as(strangers: Strangers, victim: Victim, address: tuple[str, int], number: int, rng: random.Random) -> int:
    if num_bytes := strangers.send(address, number, rng):
        victim.faults.append(f"{address} answers somebody without a certificate with {num_bytes} bytes")
    return number


def _attack(
    process: ProcessStatus,
    doors: Sequence[tuple[str, int]],
    rng: random.Random,
    stack: contextlib.ExitStack,
    identity: ProcessIdentity,
) -> Callable[[], None]:
    is_inside = process.id.role != "gateway"
    channel = None
    if process.address:
        opened = open_blocking_channel(process.address, identity=identity if is_inside else None)
        channel = stack.enter_context(opened)
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


def _for(seconds: float, attack: Callable[[], None]) -> Callable[[], int]:
    """Again and again for so long; how often that was."""

    def attacks() -> int:
        number, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            attack()
            number += 1
        return number

    return attacks


def _watch(victim: Victim, name: str, attack: Callable[[], int]) -> None:
    """`attack`: returns how many attacks it made."""
    victim.gaps_s.clear()
    over = threading.Event()
    streaming = threading.Thread(target=victim.run, args=(over,))
    streaming.start()
    num_attacks = attack()
    over.set()
    streaming.join()
    gaps_ms = sorted(1e3 * gap_s for gap_s in victim.gaps_s)
    p50, p99 = (gaps_ms[len(gaps_ms) * percent // 100] for percent in (50, 99))
    attacks = f"{name:14} {num_attacks:6} attacks"
    print(f"{attacks}, between chunks: {p50:5.0f} ms p50, {p99:5.0f} ms p99, {gaps_ms[-1]:5.0f} ms at most", flush=True)


if __name__ == "__main__":
    main()
