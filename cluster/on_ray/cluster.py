"""What we ask of Ray: who is there, what is free, placement groups on the nodes of the plan."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.deployment.settings import Settings
from cluster.errors import PlanError, StartError
from cluster.planning.inventory import MachineFacts, machine_facts
from cluster.planning.plan import Bundle, Inventory, Node, Plan, check_followed
from cluster.planning.planner import make_plan
from cluster.processes.child import REPOSITORY

logger = logging.getLogger(__name__)

NAMESPACE = "echelon"
_PREFIX = "echelon"
_PROBE_TIMEOUT_S = 60.0
_POLL_S = 0.2
_PLAN_PATIENCE_S = 5.0  # for Ray to see what was given back; not measured
_HEAD_RESOURCE = "node:__internal_head__"
_NODE_ID_LABEL = "ray.io/node-id"


@contextmanager
def connected(address: str, *, token: str = "") -> Iterator[None]:
    """A connection to the Ray at `address` (host:port), left open where the caller had it open before.

    `token` is that of a Ray which asks for one; otherwise Ray's own variables and files say. Raises StartError.
    """
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if here != address:
            raise StartError(f"this process is connected to the Ray at {here}, not to {address}; use another process")
        yield
        return
    with _authenticated(token):
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=_runtime_env(),
            )
        except (RayError, ConnectionError, RuntimeError, ValueError) as err:
            raise StartError(f"cannot connect to the Ray cluster at {address}: {err}") from err
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _authenticated(token: str) -> Iterator[None]:
    """Ray reads its token from the environment once per process. This reads it again and restores it afterwards.

    A Ray with a token is one of our own (runtime.py) and really listens on 127.0.0.1, which Ray would replace.
    """
    if not token:
        yield
        return
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ[name] for name in names if name in os.environ}
    spans_machines = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(zip(names, ("token", token), strict=True))
    ray_constants.ENABLE_RAY_CLUSTER = False
    _reread_token()
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
        ray_constants.ENABLE_RAY_CLUSTER = spans_machines
        _reread_token()


def _reread_token() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def ray_inventory() -> Inventory:
    """What every live node has to give now."""
    alive = [node for node in _all_nodes() if node["Alive"]]
    free = _free_resources()
    facts = _probe([node["NodeID"] for node in alive])
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
            )
        )
    return Inventory(nodes=tuple(nodes), head_node_id=head)


def plan_now(settings: Settings, *, patience_s: float = _PLAN_PATIENCE_S) -> Plan:
    """A plan for what the cluster has free now; raises PlanError.

    Ray's view of what is free lags a moment behind what was given back, so a plan that fails is made again for a
    while.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return make_plan(settings, ray_inventory())
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


def group_name(deployment: str, role: str) -> str:
    return f"{_PREFIX}:{deployment}:{role}"


def actor_name(deployment: str, process: str) -> str:
    return f"{_PREFIX}-{process}:{deployment}"


def remove_groups(deployment: str) -> None:
    """Give back what a controller that did not end in order has reserved."""
    for name in _groups(deployment):
        try:
            remove_placement_group(ray.util.get_placement_group(name))
        except ValueError:  # gone since
            logger.debug("%s is already removed", name)


def remnants(deployment: str) -> list[str]:
    """Names of the deployment's actors and placement groups that Ray still has."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    suffix = f":{deployment}"
    ours = [
        actor["name"]
        for actor in actors
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_PREFIX) and actor["name"].endswith(suffix)
    ]
    return ours + _groups(deployment)


def _groups(deployment: str) -> list[str]:
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


def _probe(node_ids: Sequence[str]) -> dict[str, MachineFacts]:
    """Ask each node's operating system, all at once."""
    task = ray.remote(machine_facts)
    pending = {
        node_id: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote()
        for node_id in node_ids
    }
    try:
        return {node_id: ray.get(ref, timeout=_PROBE_TIMEOUT_S) for node_id, ref in pending.items()}
    except RayError as err:
        raise PlanError(
            f"a Ray node does not run our code: {err}; its Python needs the same Echelon, installed or at {REPOSITORY}"
        ) from err


def _runtime_env() -> dict[str, Any]:
    """How Ray's workers find our code: an installed Echelon by itself, a bare checkout by its path.

    An empty one is worth having: Ray keeps idle workers ready for it, which halves the time to start an actor.
    """
    try:
        metadata.distribution("echelon")
    except metadata.PackageNotFoundError:
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    return {}
