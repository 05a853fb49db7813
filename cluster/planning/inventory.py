"""What this machine has to give: asked of the operating system, so that planning needs no Ray."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.planning.plan import Inventory, Node

MIB = 1 << 20
_NVIDIA_SMI_TIMEOUT_S = 20.0  # not measured


@dataclass(frozen=True, slots=True)
class Gpu:
    device_id: str  # as CUDA_VISIBLE_DEVICES takes it
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    cores: tuple[int, ...]  # that this process may use
    memory_bytes: int | None
    gpus: tuple[Gpu, ...]  # that this process may use

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Of the smallest GPU; None where there is none."""
        return min((gpu.memory_bytes for gpu in self.gpus), default=None)


def machine_facts() -> MachineFacts:
    return MachineFacts(cores=_cores(), memory_bytes=_free_memory_bytes(), gpus=_gpus())


def local_inventory() -> Inventory:
    """This machine as the only node, as a private Ray would see it."""
    return inventory_of(machine_facts())


def inventory_of(facts: MachineFacts) -> Inventory:
    """A machine as the only node."""
    node = Node(
        node_id="local",
        address="127.0.0.1",
        num_cpus=float(len(facts.cores)),
        num_gpus=len(facts.gpus),
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        gpu_memory_bytes=facts.gpu_memory_bytes,
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


def _gpus() -> tuple[Gpu, ...]:
    """Empty where there is no NVIDIA driver, which is the ordinary case on a laptop."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible_gpus(output, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs of an "index, uuid, MiB" listing that CUDA_VISIBLE_DEVICES leaves (None: all), in its order."""
    known: dict[str, Gpu] = {}
    for line in filter(str.strip, listing.splitlines()):
        index, uuid, mib = (field.strip() for field in line.split(","))
        known[index] = known[uuid] = Gpu(index, int(float(mib)) * MIB)
    wanted = visible.split(",") if visible is not None else [key for key in known if key.isdigit()]
    return tuple(known[key.strip()] for key in wanted if key.strip() in known)
