"""A plan: which rank runs where, on how many devices, in how much memory. `cluster.planning.planner` makes it.

Devices are counted, not numbered: which of a node's GPUs a bundle gets is Ray's choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from checkpoint.eos import EosToken
from cluster.deployment.settings import Role
from cluster.errors import PlanError
from cluster.planning.drafters import DrafterEstimate
from cluster.process_id import PartId, ProcessId

_TIB, GIB, MIB = 1 << 40, 1 << 30, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What a node has at the path of the disk tier."""

    problem: str  # why it cannot be used and what to do; empty: it can
    free_bytes: int  # of its file system, and what the folder has taken of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one Ray node has to give now."""

    node_id: str
    address: str
    num_cpus: float  # free
    num_gpus: int  # free
    cores: tuple[int, ...] = ()  # to which a process may be pinned; empty: not known, or others use them
    memory_bytes: int | None = None  # free; None: not known
    gpu_memory_bytes: int | None = None  # of the smallest of its GPUs; None: not known
    disk: DiskFacts | None = None  # None: not known, or there is no disk tier
    server_problem: str = ""  # what is wrong with the gateway's files there; empty: nothing, or it is not known

    @property
    def label(self) -> str:
        return f"{self.node_id[:8]} ({self.address})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    nodes: tuple[Node, ...]
    head_node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Of one device."""

    weight_bytes: int
    kv_cache_bytes: int  # cuda: what gpu_memory_utilization leaves; at least one longest seq
    activation_bytes: int
    host_bytes: int = 0  # of the node's memory, in addition to the device's, for KV blocks

    @property
    def total_bytes(self) -> int:
        """Of the device."""
        return self.weight_bytes + self.kv_cache_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One worker process and its device."""

    group: Role
    replica: int = 0
    rank: int
    engines: tuple[Role, ...]
    node_id: str
    address: str
    num_gpus: int
    num_cpus: float  # as asked of Ray; less than threads_per_worker where cores are shared
    cpu_ids: tuple[int, ...]  # cores to be pinned to; empty: not pinned
    memory: MemoryEstimate
    num_host_slots: int = 0  # KV blocks in host memory, of each engine
    num_disk_blocks: int = 0  # on disk, of each engine: in whole segments
    disk_bytes: Mapping[Role, int] = field(default_factory=dict)  # of the disk, for each engine

    @property
    def id(self) -> ProcessId:
        return ProcessId(role=self.group, replica=self.replica, rank=self.rank)

    @property
    def name(self) -> str:
        return self.id.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlProcess:
    """A process without a device; it asks Ray for no CPU."""

    id: ProcessId
    name: str = field(init=False)  # of the id; a field, so that it is shown
    node_id: str
    address: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.id.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPlan:
    process: ControlProcess
    port_offset: int = 0  # the place among those of its node: ports of the next one are one further


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One copy of the models: its worker groups, and the scheduler that orders their rounds."""

    bundles: tuple[Bundle, ...]
    scheduler: ControlProcess

    @property
    def number(self) -> int:
        return self.scheduler.id.replica

    @property
    def processes(self) -> tuple[Bundle | ControlProcess, ...]:
        """In the order in which they start."""
        return (*self.bundles, self.scheduler)

    @property
    def needs(self) -> dict[PartId, list[PartId]]:
        """What a part waits for: a scheduler becomes ready when its target answers."""
        return {self.scheduler.id.part: [PartId(role="target", replica=self.number)]}

    def group(self, role: Role) -> tuple[Bundle, ...]:
        """The bundles of one group in the order of rank; none where the group does not exist."""
        return tuple(bundle for bundle in self.bundles if bundle.group == role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    deployment: str
    device: str
    replicas: tuple[ReplicaPlan, ...]
    gateways: tuple[GatewayPlan, ...]  # the first one on the head node
    http_url: str = ""  # where the first one will serve HTTP; empty: nowhere
    eos: tuple[EosToken, ...]  # with which a stream stops
    notes: tuple[str, ...]  # what a person should know: cores are shared, memory is not known, ...
    drafters: tuple[DrafterEstimate, ...] = ()  # what they would gain, if that was asked for

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Of all replicas."""
        return tuple(bundle for replica in self.replicas for bundle in replica.bundles)

    @property
    def processes(self) -> tuple[Bundle | ControlProcess, ...]:
        """In the order in which they start."""
        return (*(process for replica in self.replicas for process in replica.processes), *self.gateway_processes)

    @property
    def gateway_processes(self) -> tuple[ControlProcess, ...]:
        return tuple(gateway.process for gateway in self.gateways)


def size_text(num_bytes: float) -> str:
    if num_bytes >= _TIB:
        return f"{num_bytes / _TIB:.2f} TiB"
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"


def describe_devices(bundle: Bundle | None, gpu_ids: Sequence[str] = ()) -> str:
    """What a worker was given, for people; empty for a control process."""
    if bundle is None:
        return ""
    if bundle.num_gpus:
        return ", ".join(f"cuda:{gpu}" for gpu in gpu_ids)
    return f"cores {','.join(str(core) for core in bundle.cpu_ids)}" if bundle.cpu_ids else "shared cores"


def check_followed(bundles: Sequence[Bundle], got: Mapping[int, str]) -> None:
    """Raise PlanError for every bundle that is not on the node of the plan. `got`: bundle index -> node id."""
    strayed = [
        f"{bundle.name}: wanted node {bundle.node_id}, got {got.get(index) or 'none'}"
        for index, bundle in enumerate(bundles)
        if got.get(index) != bundle.node_id
    ]
    if strayed:
        raise PlanError("Ray did not follow the plan: " + "; ".join(strayed))
