"""What this machine has to give: asked of the operating system, so that planning needs no Ray."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.plan import Inventory, Node

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    cores: tuple[int, ...]  # that this process may use
    memory_bytes: int | None
    gpu_memory_bytes: tuple[int, ...]  # of each GPU


def machine_facts() -> MachineFacts:
    return MachineFacts(cores=_cores(), memory_bytes=_free_memory_bytes(), gpu_memory_bytes=_gpu_memory_bytes())


def local_inventory() -> Inventory:
    """This machine as the only node, as a private Ray would see it."""
    facts = machine_facts()
    node = Node(
        node_id="local",
        address="127.0.0.1",
        num_cpus=float(len(facts.cores)),
        num_gpus=len(facts.gpu_memory_bytes),
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        gpu_memory_bytes=min(facts.gpu_memory_bytes, default=None),
    )
    return Inventory(nodes=(node,), head_node_id="local")


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _free_memory_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _gpu_memory_bytes() -> tuple[int, ...]:
    """Empty where there is no NVIDIA driver, which is the ordinary case on a laptop."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(float(line)) * MIB for line in output.split("\n") if line.strip())
