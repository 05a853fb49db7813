"""What we ask of Ray: its nodes, what is free, placement groups on the nodes of the plan."""

import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.deployment.settings import Settings
from cluster.errors import PlanError
from cluster.planning.inventory import MachineFacts, machine_facts
from cluster.planning.plan import Bundle, Inventory, Node, Plan, ReplicaPlan, check_followed
from cluster.planning.planner import make_plan, plan_changed, plan_more
from cluster.processes.child import REPOSITORY

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE = "echelon"
_PREFIX = "echelon"
_PROBE_TIMEOUT_S = 60.0
_POLL_S = 0.2
_PLAN_PATIENCE_S = 5.0  # for Ray to see what was given back; not measured
_HEAD_RESOURCE = "node:__internal_head__"
_NODE_ID_LABEL = "ray.io/node-id"


def ray_inventory(settings: Settings, *, without: Container[str] = ()) -> Inventory:
    """What every live node has to give to this deployment now. `without`: ids of nodes that are not asked."""
    alive = [node for node in _all_nodes() if node["Alive"] and node["NodeID"] not in without]
    free = _free_resources()
    facts = _probe([node["NodeID"] for node in alive], settings)
    head = next((node["NodeID"] for node in alive if _HEAD_RESOURCE in node["Resources"]), "")
    nodes = []
    for node in alive:
        node_id, total = node["NodeID"], node["Resources"]
        available, machine = free.get(node_id, {}), facts[node_id]
        # Ray counts CPUs and does not number them: cores can be chosen only where nobody else has any.
        is_idle = available.get("CPU", 0.0) == total.get("CPU", 0.0)
        nodes.append(
            Node(
                node_id=node_id,
                address=node["NodeManagerAddress"],
                num_cpus=available.get("CPU", 0.0),
                num_gpus=int(available.get("GPU", 0.0)),
                cores=machine.cores if is_idle else (),
                memory_bytes=machine.memory_bytes,
                gpu_memory_bytes=machine.gpu_memory_bytes,
                disk=machine.disk,
                server_problem=machine.server_problem,
            )
        )
    return Inventory(nodes=tuple(nodes), head_node_id=head)


def plan_now(settings: Settings, *, patience_s: float = _PLAN_PATIENCE_S) -> Plan:
    """A plan for what the cluster has free now; raises PlanError.

    Ray's view of what is free lags a moment behind what was given back, so a plan that fails is made again for a
    while.
    """
    return _patiently(lambda: make_plan(settings, ray_inventory(settings)), patience_s)


def plan_for(plan: Plan, settings: Settings, num_replicas: int, *, patience_s: float = _PLAN_PATIENCE_S) -> Plan:
    """The plan of what runs, with so many replicas: further ones on what is free now, or without the last ones."""
    if num_replicas <= len(plan.replicas):
        return replace(plan, replicas=plan.replicas[:num_replicas])
    return _patiently(lambda: plan_more(plan, settings, ray_inventory(settings), num_replicas), patience_s)


def plan_changed_now(plan: Plan, settings: Settings, *, patience_s: float = _PLAN_PATIENCE_S) -> ReplicaPlan:
    """One replica with these settings, on what is free now beside what `plan` says; raises PlanError."""
    return _patiently(lambda: plan_changed(plan, settings, ray_inventory(settings)), patience_s)


def _patiently(make: Callable[[], T], patience_s: float) -> T:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return make()
        except PlanError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)


def reserve(name: str, bundles: Sequence[Bundle], timeout_s: float) -> PlacementGroup:
    """A placement group with each bundle on the node that the plan gives it.

    Raises PlanError where Ray cannot reserve it in time or has put a bundle elsewhere; nothing stays reserved then.
    """
    group: PlacementGroup = placement_group(
        [_resources(bundle) for bundle in bundles],
        strategy="PACK",
        name=name,
        lifetime="detached",  # a controller that is lost leaves it to the next one
        bundle_label_selector=[{_NODE_ID_LABEL: bundle.node_id} for bundle in bundles],
    )
    try:
        if not group.wait(timeout_s):
            raise PlanError(_not_reserved(name, bundles, timeout_s))
        check_followed(bundles, placement_group_table(group)["bundles_to_node_id"])
    except PlanError:
        remove_placement_group(group)
        raise
    return group


def group_name(deployment: str, part: str) -> str:
    return f"{_PREFIX}:{deployment}:{part}"


def actor_name(deployment: str, process: str) -> str:
    return f"{_PREFIX}-{process}:{deployment}"


def controller_name(deployment: str) -> str:
    return actor_name(deployment, "controller")


def find_controller(deployment: str) -> Any | None:
    try:
        return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)
    except ValueError:  # Ray's way to say that there is none
        return None


def remove_groups(deployment: str, *, keep: Container[str] = ()) -> None:
    """Give back what a controller that did not end in order has reserved."""
    for name in (name for name in groups_of(deployment) if name not in keep):
        try:
            remove_placement_group(ray.util.get_placement_group(name))
        except ValueError:  # gone since
            logger.debug("%s is already removed", name)


def remnants(deployment: str) -> list[str]:
    """Names of the deployment's actors and placement groups that Ray still has."""
    return actors_of(deployment) + groups_of(deployment)


def end_actors(deployment: str, *, keep: Container[str] = ()) -> None:
    """Hosts outlive their controller; their children do not outlive them."""
    for name in (name for name in actors_of(deployment) if name not in keep):
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:  # gone since
            logger.debug("%s has already ended", name)


def actors_of(deployment: str) -> list[str]:
    """Names of its actors: the controller and the hosts."""
    return [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
        and actor["name"].startswith(_PREFIX)
        and actor["name"].endswith(f":{deployment}")
    ]


def groups_of(deployment: str) -> list[str]:
    """Names of its placement groups."""
    prefix = group_name(deployment, "")
    return [
        group["name"]
        for group in placement_group_table().values()
        if group["name"].startswith(prefix) and group["state"] != "REMOVED"
    ]


def _resources(bundle: Bundle) -> dict[str, float]:
    return {"GPU": float(bundle.num_gpus)} if bundle.num_gpus else {"CPU": bundle.num_cpus}


def _not_reserved(name: str, bundles: Sequence[Bundle], timeout_s: float) -> str:
    """Ray says only that it waits; what it waits for is the difference between the plan and what is free now."""
    free = _free_resources()
    wanted = [
        f"{bundle.name} wants {_resources(bundle)} on node {bundle.node_id[:8]} ({bundle.address}), "
        f"free there: { {kind: free.get(bundle.node_id, {}).get(kind, 0.0) for kind in _resources(bundle)} }"
        for bundle in bundles
    ]
    return (
        f"Ray did not reserve {name} within {timeout_s:.0f} s; somebody took the devices since the plan was made: "
        + ("; ".join(wanted))
    )


def _all_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _free_resources() -> dict[str, dict[str, float]]:
    """By node id. Ray's public functions give the sum over the cluster only."""
    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return free


def _probe(node_ids: Sequence[str], settings: Settings) -> dict[str, MachineFacts]:
    """Ask each node's operating system, all at once."""
    task: Any = ray.remote(machine_facts)
    pending = {
        node_id: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(settings.kv_cache.disk, settings.server)
        for node_id in node_ids
    }
    try:
        return {node_id: ray.get(ref, timeout=_PROBE_TIMEOUT_S) for node_id, ref in pending.items()}
    except RayError as err:
        raise PlanError(
            f"a Ray node does not run our code: {err}; its Python needs the same Echelon, installed or at {REPOSITORY}"
        ) from err
