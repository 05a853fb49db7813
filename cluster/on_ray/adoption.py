"""What a lost controller has left, which the next one takes over: hosts with their processes, and placement groups.

Nothing is started again here. What has ended meanwhile counts as lost, and the supervisor starts it as usual.
"""

import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, get_placement_group

from cluster.deployment.settings import ServerSettings, Settings
from cluster.on_ray.cluster import (
    actor_name,
    actors_of,
    controller_name,
    end_actors,
    group_name,
    groups_of,
    remove_groups,
)
from cluster.on_ray.desired import DesiredState
from cluster.on_ray.host import HostedProcess, RayChild, find_host, new_teller
from cluster.planning.plan import Bundle, ControlProcess, GatewayPlan, Plan, ReplicaPlan
from cluster.process_id import PartId
from cluster.processes.rollout import RunningDeployment, RunningReplica, process_ids
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.supervision import Board
from cluster.processes.worker_group import RunningGroup
from echelon.pb.worker_pb2 import WorkerInfo

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 30.0
_LOST = "it was lost while the controller was away"
_UNREADY = "it was being started when the controller was lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A host and the process that it runs or ran last."""

    host: Any
    process: HostedProcess
    teller: str  # as the host knows whoever tells the process of updates


def find_processes(plan: Plan) -> dict[str, Found]:
    """By name. Those that nobody answers for are left out."""
    found = {}
    for name, host_name in _hosts(plan).items():
        try:
            host, teller = find_host(host_name), new_teller()
            hosted = ray.get(host.take_over.remote(teller), timeout=_ANSWER_TIMEOUT_S)
        except (RayError, ValueError) as err:  # ValueError: gone since
            logger.warning("the host of %s does not answer: %s", name, err)
            continue
        if hosted is not None:
            found[name] = Found(host=host, process=hosted, teller=teller)
    return found


def find_groups(plan: Plan) -> dict[PartId, PlacementGroup]:
    known = set(groups_of(plan.deployment))
    parts = {bundle.id.part for bundle in plan.bundles}
    names = {part: group_name(plan.deployment, part.name) for part in parts}
    return {part: get_placement_group(name) for part, name in names.items() if name in known}


def end_others(plan: Plan, found: Mapping[str, Found], groups: Iterable[PartId]) -> None:
    """What does not belong to the plan: of replicas that were coming or going, and earlier hosts of the same name."""
    hosts = {each.process.host_name for each in found.values()}
    end_actors(plan.deployment, keep={*hosts, controller_name(plan.deployment)})
    remove_groups(plan.deployment, keep={group_name(plan.deployment, part.name) for part in groups})


def adopt(plan: Plan, processes: ProcessSet, found: Mapping[str, Found]) -> dict[str, RayChild]:
    """Watch what runs; say of the rest that it is lost.

    So is what was not ready yet: nobody waits for it any more, and nobody would tell the others where it is."""
    processes.expect(process_ids(plan))
    children = {}
    for process in plan.processes:
        known = found.get(process.name)
        if known is not None:
            launch = _launch(process, known.process)
            children[process.name] = RayChild(launch, known.host, known.process, known.teller)
            processes.adopt(launch, children[process.name], known.process.events)
    for process in plan.processes:
        if process.name not in found:
            processes.miss(process.name, _LOST)
        elif processes.read(lambda board, name=process.name: board.ready_process(name)) is None:  # type: ignore[misc]
            processes.fail([process.name], _UNREADY)
    return children


def where_all_is(desired: DesiredState, processes: ProcessSet, found: Mapping[str, Found]) -> RunningDeployment:
    """Of what is lost, where it was or will be."""
    plan, server = desired.plan, desired.settings.server
    return processes.read(
        lambda board: RunningDeployment(
            replicas=tuple(
                _replica(replica, desired.settings_of(replica.number), board, found) for replica in plan.replicas
            ),
            gateway_addresses=tuple(_gateway_address(gateway, board, server) for gateway in plan.gateways),
        )
    )


def _replica(replica: ReplicaPlan, settings: Settings, board: Board, found: Mapping[str, Found]) -> RunningReplica:
    target, draft = replica.group("target"), replica.group("draft")
    return RunningReplica(
        settings=settings,
        target=_group(target, board, found),
        draft=_group(draft, board, found) if draft else None,
        scheduler_address=board.process(replica.scheduler.name).address,
    )


def _group(bundles: tuple[Bundle, ...], board: Board, found: Mapping[str, Found]) -> RunningGroup:
    """An incarnation that nobody knows any more was smaller than the time."""
    known = [found[bundle.name].process.incarnation for bundle in bundles if bundle.name in found]
    incarnation = max(known, default=int(time.time()))
    return RunningGroup(address=board.process(bundles[0].name).address, incarnation=incarnation, info=WorkerInfo())


def _gateway_address(gateway: GatewayPlan, board: Board, server: ServerSettings) -> str:
    port = server.at(gateway.port_offset).grpc_port
    return board.process(gateway.process.name).address or f"{gateway.process.address}:{port}"


def _launch(process: Bundle | ControlProcess, hosted: HostedProcess) -> Launch:
    bundle = process if isinstance(process, Bundle) else None
    spec = WorkerInfo()  # what it was told is not asked again
    return Launch(id=process.id, module="", spec=spec, node=process.address, bundle=bundle, number=hosted.launch_number)


def _hosts(plan: Plan) -> dict[str, str]:
    """The name of the latest host of each process: one whose host was lost got another, with a number."""
    hosts, alive = {}, actors_of(plan.deployment)
    for process in plan.processes:
        pattern = re.compile(re.escape(actor_name(plan.deployment, process.name)).replace(":", r"(?:-(\d+))?:"))
        numbered = {int(match[1] or 1): name for name in alive if (match := pattern.fullmatch(name))}
        if numbered:
            hosts[process.name] = numbered[max(numbered)]
    return hosts
