"""What this machine has to give: asked of the operating system, so that planning needs no Ray."""

import contextlib
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from childproc.disk_folder import folder_problem, nearest_folder
from childproc.tls_identity import TlsFileError, TlsIdentity
from childproc.tokens_file import TokensFileError, read_tokens_file
from cluster.deployment.settings import DiskSettings, ServerSettings
from cluster.planning.plan import DiskFacts, Inventory, Node
from echelon.pb.process_pb2 import TlsSection

MIB = 1 << 20
_NVIDIA_SMI_TIMEOUT_S = 20.0  # not measured


@dataclass(frozen=True, slots=True)
class Gpu:
    device_id: str  # as CUDA_VISIBLE_DEVICES takes it
    memory_bytes: int | None  # None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    cores: tuple[int, ...]  # that this process may use
    memory_bytes: int | None
    gpus: tuple[Gpu, ...]  # that this process may use
    disk: DiskFacts | None = None
    server_problem: str = ""

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Of the smallest GPU; None if there is none, or if a size is not known."""
        sizes = [gpu.memory_bytes for gpu in self.gpus if gpu.memory_bytes is not None]
        return min(sizes) if sizes and len(sizes) == len(self.gpus) else None


def machine_facts(disk: DiskSettings | None = None, server: ServerSettings | None = None) -> MachineFacts:
    """`disk`: the disk tier that is wanted; `server`: the gateway that may run here."""
    return MachineFacts(
        cores=_cores(),
        memory_bytes=_free_memory_bytes(),
        gpus=_gpus(),
        disk=None if disk is None else _disk_facts(disk),
        server_problem="" if server is None else _server_problem(server),
    )


def local_inventory(disk: DiskSettings | None = None, server: ServerSettings | None = None) -> Inventory:
    """This machine as the only node, as a private Ray would see it."""
    return inventory_of(machine_facts(disk, server))


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
        disk=facts.disk,
        server_problem=facts.server_problem,
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


def _disk_facts(disk: DiskSettings) -> DiskFacts:
    folder = Path(disk.path)
    if problem := folder_problem(folder, read_only=disk.read_only):
        return DiskFacts(problem=problem, free_bytes=0)
    free_bytes = shutil.disk_usage(nearest_folder(folder)).free
    return DiskFacts(problem="", free_bytes=free_bytes + sum(map(_file_bytes, folder.rglob("*"))))


def _server_problem(server: ServerSettings) -> str:
    """What is wrong with the gateway's files on this machine; empty: nothing."""
    try:
        if server.tls is not None:
            TlsIdentity.read(TlsSection(**asdict(server.tls)))
        if server.auth is not None:
            read_tokens_file(Path(server.auth.tokens_file))
    except TlsFileError as err:
        return f"server.tls.{err}"
    except TokensFileError as err:
        return f"server.auth.tokens_file: {err}"
    folder = Path(server.audit_file).parent
    if server.audit_file and not os.access(folder, os.W_OK | os.X_OK):
        return f"server.audit_file: folder {folder} is missing or cannot be written; make it, or name another"
    return ""


def _file_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):  # a running deployment has just evicted it
        return path.stat().st_size if path.is_file() else 0
    return 0


def _gpus() -> tuple[Gpu, ...]:
    """Empty without an NVIDIA driver, which is the ordinary case on a laptop."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=_NVIDIA_SMI_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return visible_gpus(output, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs of an "index, uuid, MiB" listing that CUDA_VISIBLE_DEVICES leaves (None: all), in its order."""
    known: dict[str, Gpu] = {}
    for line in filter(str.strip, listing.splitlines()):
        index, uuid, mib = (field.strip() for field in line.split(","))
        # A GPU that shares the machine's memory has "[N/A]" there.
        known[index] = known[uuid] = Gpu(index, int(mib) * MIB if mib.isdecimal() else None)
    wanted = visible.split(",") if visible is not None else [key for key in known if key.isdigit()]
    return tuple(known[key.strip()] for key in wanted if key.strip() in known)
