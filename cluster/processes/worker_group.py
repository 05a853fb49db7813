"""Start a worker group: the leader opens the store, the others join it, and the leader answers for all."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.deployment.settings import Role
from cluster.errors import StartError
from cluster.planning.plan import Bundle
from cluster.process_id import ProcessId
from cluster.processes.startup import Launch, ProcessSet, Spawn
from cluster.processes.status import ProcessStatus
from echelon.pb.process_pb2 import GroupEndpoint, WorkerSpec
from echelon.pb.worker_pb2 import WorkerInfo

_WORKER_MODULE, _SPARE_MODULE = "workers", "workers.spare"
_FAILED_GRACE_S = 1.0  # a start that failed has nothing to finish


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGroup:
    """A group whose ranks are all ready."""

    address: str  # host:port of the leader's gRPC server
    incarnation: int
    info: WorkerInfo

    @property
    def endpoint(self) -> GroupEndpoint:
        return GroupEndpoint(address=self.address, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLaunch:
    """A group to be started: a spec for each rank, the leader's first, and the bundle of each."""

    role: Role
    replica: int = 0
    specs: Sequence[WorkerSpec]
    bundles: Sequence[Bundle | None]

    @property
    def ids(self) -> list[ProcessId]:
        """By rank."""
        return [ProcessId(role=self.role, replica=self.replica, rank=rank) for rank in range(len(self.specs))]

    @property
    def names(self) -> list[str]:
        return [process.name for process in self.ids]

    @property
    def leader(self) -> str:
        return self.ids[0].name


def start_groups(
    processes: ProcessSet, groups: Sequence[GroupLaunch], deadline: float, *, within: Sequence[str] | None = None
) -> list[RunningGroup]:
    """Start groups side by side and block until every rank is ready.

    Raises StartError with the error of the first process that fails (`within`: of these), or naming those that are
    late.
    """
    for group in groups:
        processes.launch(_launch(group, 0, store_address=""))
        for rank in range(1, len(group.specs)):
            processes.prepare(_launch(group, rank, store_address=""))
    for group in groups:
        if len(group.specs) > 1:
            # Stores open within moments of the process start, before any weights are read. The others import meanwhile.
            store_address = processes.wait_store(group.leader, deadline, within=within)
            for rank in range(1, len(group.specs)):
                processes.launch(_launch(group, rank, store_address=store_address))
    processes.wait_ready([name for group in groups for name in group.names], deadline, within=within)
    return [_running(processes, group) for group in groups]


def start_worker_group(
    specs: Sequence[WorkerSpec],
    spawn: Spawn,
    *,
    role: Role = "target",
    on_progress: Callable[[ProcessStatus], None] = lambda _: None,
    timeout_s: float,
) -> tuple[RunningGroup, ProcessSet]:
    """One group alone, for tests and measurements; the caller stops the returned processes.

    Raises StartError, after everything was stopped again.
    """
    processes = ProcessSet(spawn, on_change=on_progress)
    group = GroupLaunch(role=role, specs=specs, bundles=[None] * len(specs))
    try:
        (running,) = start_groups(processes, [group], time.monotonic() + timeout_s)
    except StartError:
        processes.stop(grace_s=_FAILED_GRACE_S)
        raise
    return running, processes


def _launch(group: GroupLaunch, rank: int, *, store_address: str) -> Launch:
    spec = WorkerSpec()
    spec.CopyFrom(group.specs[rank])
    spec.store_address = store_address
    # Libraries size their thread pools when they are imported, before the worker has read its spec.
    env = {"OMP_NUM_THREADS": str(max(1, spec.threads)), "ECHELON_COMPILE": spec.compile}
    if spec.compile != "off" or not spec.cpu_ids:
        # A thread that spins at a barrier keeps the one it waits for from running, where others use the cores too:
        # other processes, or the threads of compiled kernels.
        env["OMP_WAIT_POLICY"] = "passive"
    return Launch(
        id=group.ids[rank],
        module=_WORKER_MODULE,
        spare_module=_SPARE_MODULE,
        spec=spec,
        node=spec.host,
        bundle=group.bundles[rank],
        env=env,
    )


def _running(processes: ProcessSet, group: GroupLaunch) -> RunningGroup:
    return RunningGroup(
        address=processes.read(lambda board: board.process(group.leader).address),
        incarnation=group.specs[0].incarnation,
        info=processes.read(lambda board: board.worker_info(group.leader)),
    )
