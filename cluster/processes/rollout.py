"""Bring a planned deployment up in order: worker groups, then the scheduler, then the gateway."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from childproc.ports import try_bind
from cluster.deployment.settings import ServerSettings, Settings
from cluster.errors import StartError
from cluster.planning.plan import Bundle, ControlProcess, GatewayPlan, Plan, ReplicaPlan
from cluster.process_id import ProcessId
from cluster.processes.specs import gateway_spec, placed_processes, scheduler_spec, worker_specs
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.worker_group import GroupLaunch, RunningGroup, start_groups

logger = logging.getLogger(__name__)

_SCHEDULER_MODULE = "scheduler"
_GATEWAY_MODULE = "gateway"
_FIRST_INCARNATION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningReplica:
    settings: Settings  # with which it was started
    target: RunningGroup
    draft: RunningGroup | None  # None: no draft model, or it lives in the target's processes
    scheduler_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDeployment:
    replicas: tuple[RunningReplica, ...]
    gateway_addresses: tuple[str, ...]  # none: started without a gateway

    @property
    def gateway_address(self) -> str:
        """As clients take it, for all gateways; empty: there is none."""
        return ",".join(self.gateway_addresses)


def process_ids(plan: Plan, *, gateway: bool = True) -> list[ProcessId]:
    """Every process of a plan, in the order in which they start."""
    return [process.id for process in plan.processes if gateway or process not in plan.gateway_processes]


def stop_order(plan: Plan) -> list[str]:
    """Gateways stop first, so that nothing is asked of processes that are already gone."""
    return [
        *(process.name for process in plan.gateway_processes),
        *(replica.scheduler.name for replica in plan.replicas),
    ]


def roll_out(
    settings: Settings, plan: Plan, processes: ProcessSet, *, timeout_s: float, gateway: bool = True
) -> RunningDeployment:
    """Start everything and block until it serves. Raises StartError; the caller then stops `processes`.

    The caller says `all_ready` once it can be asked for changes.
    """
    deadline = time.monotonic() + timeout_s
    processes.expect(process_ids(plan, gateway=gateway))
    replicas = start_replicas(settings, plan.replicas, processes, deadline)
    schedulers = [replica.scheduler_address for replica in replicas]
    addresses = []
    for each in plan.gateways if gateway else ():
        launch_gateway(settings, plan, each, processes, scheduler_addresses=schedulers)
        addresses.append(wait_gateway(each, processes, deadline))
    return RunningDeployment(replicas=tuple(replicas), gateway_addresses=tuple(addresses))


def start_replicas(
    settings: Settings,
    replicas: Sequence[ReplicaPlan],
    processes: ProcessSet,
    deadline: float,
    *,
    within: Sequence[str] | None = None,
) -> list[RunningReplica]:
    """All side by side. `within` and errors as in `start_groups`."""
    groups = [
        group_launch(settings, bundles, _FIRST_INCARNATION)
        for replica in replicas
        for bundles in (replica.group("target"), replica.group("draft"))
        if bundles
    ]
    started = start_groups(processes, groups, deadline, within=within)
    ready = {(launch.replica, launch.role): group for launch, group in zip(groups, started, strict=True)}
    running = []
    for replica in replicas:
        target, draft = ready[replica.number, "target"], ready.get((replica.number, "draft"))
        address = start_scheduler(
            settings, replica.scheduler, processes, target, draft, deadline=deadline, within=within
        )
        running.append(RunningReplica(settings=settings, target=target, draft=draft, scheduler_address=address))
    return running


def group_launch(settings: Settings, bundles: Sequence[Bundle], incarnation: int) -> GroupLaunch:
    """The start of the group of these bundles, which go by rank."""
    specs = worker_specs(settings, bundles, incarnation)
    return GroupLaunch(role=bundles[0].group, replica=bundles[0].replica, specs=specs, bundles=bundles)


def check_port(host: str, port: int, key: str, *, alternative: str = "") -> None:
    """Raise StartError if nobody could listen there: better now than after ten minutes of loading.

    `alternative` is what a person could do other than to choose another port.
    """
    try:
        try_bind(host, port)
    except OSError as err:
        reason = err.strerror or str(err)
        raise StartError(
            f"{key} {port} on {host} cannot be used: {reason}; "
            f"stop what listens there or choose another {key}{alternative}"
        ) from err


def check_ports(plan: Plan, server: ServerSettings) -> None:
    """The same for those of the gateways on the first one's node, which is this one."""
    for gateway in plan.gateways:
        if gateway.process.node_id == plan.gateways[0].process.node_id:
            own = server.at(gateway.port_offset)
            check_port(own.host, own.grpc_port, "server.grpc_port")
            if own.http_port:
                check_port(own.host, own.http_port, "server.http_port", alternative=" (null: serve no HTTP)")


def start_scheduler(
    settings: Settings,
    process: ControlProcess,
    processes: ProcessSet,
    target: RunningGroup,
    draft: RunningGroup | None,
    *,
    deadline: float,
    within: Sequence[str] | None = None,
) -> str:
    """Its address, once it is ready. `within` and errors as in `start_groups`."""
    draft_group = target if settings.colocated else draft
    spec = scheduler_spec(
        settings,
        process=process,
        target=target.endpoint,
        draft=None if draft_group is None else draft_group.endpoint,
    )
    processes.launch(Launch(id=process.id, module=_SCHEDULER_MODULE, spec=spec, node=process.address))
    processes.wait_ready([process.name], deadline, within=within)
    return processes.read(lambda board: board.process(process.name).address)


def launch_gateway(
    settings: Settings,
    plan: Plan,
    gateway: GatewayPlan,
    processes: ProcessSet,
    *,
    scheduler_addresses: Sequence[str],
    grpc_port: int | None = None,
) -> None:
    """Start it without waiting. `grpc_port`: the one that it had before."""
    process = gateway.process
    spec = gateway_spec(
        settings,
        gateway,
        scheduler_addresses=scheduler_addresses,
        processes=placed_processes(plan.processes, processes.devices_of),
    )
    if grpc_port is not None:
        spec.server.grpc_port = grpc_port
    processes.launch(Launch(id=process.id, module=_GATEWAY_MODULE, spec=spec, node=process.address))


def wait_gateway(
    gateway: GatewayPlan, processes: ProcessSet, deadline: float, *, within: Sequence[str] | None = None
) -> str:
    """Its address, once it is ready. `within` and errors as in `start_groups`."""
    name = gateway.process.name
    processes.wait_ready([name], deadline, within=within)
    return processes.read(lambda board: board.process(name).address)
