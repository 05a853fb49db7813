"""How a deployment and its processes fare: what the controller reports and the CLI shows."""

from dataclasses import dataclass, field
from enum import StrEnum

from cluster.planning.plan import Plan
from cluster.process_id import ProcessId


class State(StrEnum):
    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    DEGRADED = "DEGRADED"  # a deployment only: it serves, without speculation or without its disk tier
    RECOVERING = "RECOVERING"  # a deployment only: a part that it needs was lost and is being started again
    NOT_RESPONDING = "NOT_RESPONDING"  # it lives and does not answer: it is stopped, hangs or is out of reach
    DRAINED = "DRAINED"  # a deployment only: it finishes what it has and takes nothing new
    FAILED = "FAILED"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    id: ProcessId
    name: str = field(init=False)  # of the id; a field, so that it is shown
    state: State = State.PENDING
    node: str = ""  # address of its node
    devices: str = ""  # "cuda:3", "cores 0-1", "shared cores"
    pid: int | None = None
    address: str = ""  # of its gRPC server, if it has one
    inside_address: str = ""  # where it answers the controller, if `address` speaks TLS
    stage: str = ""  # what it last reported: "loading target weights"
    done: int = 0
    total: int = 0  # 0: not known
    error: str = ""
    spare: str = ""  # of the process that could take its place: "starting" | "ready"; empty: there is none
    was_spare: bool = False  # it was such a process itself

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.id.name)

    @property
    def asked_at(self) -> str:
        """Where the controller asks how it is."""
        return self.inside_address or self.address


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """One tier of an engine's KV cache. Bytes are those of one rank; numbers are blocks since the start."""

    replica: int = 0
    engine: str  # "target" | "draft"
    tier: str  # "host" | "disk"
    used_bytes: int
    capacity_bytes: int
    num_stored: int  # that came into the tier
    num_fetched: int  # that were read from it
    num_failed: int
    num_damaged: int  # of them: the checksum was wrong
    num_evicted: int
    saved_s: float  # by what came back: to compute it would have taken so much longer
    paused: bool  # left alone for a while after errors
    last_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentEvent:
    """A part was lost, started again, or given up."""

    at: float  # seconds since 1970
    part: str  # "target-0" | "draft-0" | "scheduler-0" | "gateway-0" | ...
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    name: str
    state: State
    reason: str = ""  # why it is not READY
    detail: str = ""  # traceback or log tail that explains the reason
    endpoint: str = ""  # host:port of the public gRPC server
    http_url: str = ""  # of the public HTTP server; empty: there is none
    model: str = ""
    ray_address: str = ""
    private_ray: bool = False  # started by `up`, stopped by `down`
    processes: tuple[ProcessStatus, ...] = ()
    tiers: tuple[TierUse, ...] = ()  # as last heard; none: nothing heard, or there are none
    events: tuple[DeploymentEvent, ...] = ()  # the latest, oldest first
    plan: Plan | None = None
    settings: dict[str, str | int | float | bool] | None = None  # resolved values a person may ask for

    @property
    def num_replicas(self) -> int:
        return 0 if self.plan is None else len(self.plan.replicas)
