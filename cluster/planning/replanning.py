"""Another place for a part of a deployment that serves, because its node is lost. Pure."""

from collections.abc import Container, Iterable
from dataclasses import replace

from cluster.deployment.settings import Settings
from cluster.errors import PlanError
from cluster.planning.plan import Bundle, GatewayPlan, Inventory, Node, Plan, ReplicaPlan
from cluster.planning.planner import EVERYWHERE, check_host_memory, loopback_beside, place_ranks
from cluster.planning.ranks import ranks_of
from cluster.planning.tiers import check_disks, with_tiers_of
from cluster.process_id import PartId


def plan_group_again(plan: Plan, part: PartId, settings: Settings, inventory: Inventory) -> ReplicaPlan:
    """The replica with this worker group on what is free now, on one node with its other group if there is room.

    Raises PlanError.
    """
    before = replica_of(plan, part)
    others = tuple(bundle for bundle in before.bundles if bundle.id.part != part)
    beside = {bundle.node_id for bundle in others}
    near = replace(inventory, nodes=tuple(node for node in inventory.nodes if node.node_id in beside))
    try:
        moved = _place_group(before, part, settings, near)
    except PlanError:
        moved = _place_group(before, part, settings, inventory)
    alone = loopback_beside(plan.gateways, replace(before, bundles=(*moved, *others)))
    moved = tuple(bundle for bundle in alone.bundles if bundle.id.part == part)
    return replace(before, bundles=(*moved, *others) if part.role == "target" else (*others, *moved))


def _place_group(before: ReplicaPlan, part: PartId, settings: Settings, inventory: Inventory) -> tuple[Bundle, ...]:
    if not inventory.nodes:
        raise PlanError("there is no other node")
    ranks = [rank for rank in ranks_of(settings, part.replica) if rank.group == part.role]
    placed, _ = place_ranks(settings, inventory, ranks)
    bundles = with_tiers_of(placed, before.bundles)
    check_host_memory(bundles, inventory, settings)
    check_disks(bundles, inventory, settings)
    return bundles


def plan_scheduler_again(plan: Plan, part: PartId) -> ReplicaPlan:
    """The replica with its scheduler beside the leader of its target."""
    before = replica_of(plan, part)
    leader = before.group("target")[0]
    scheduler = replace(before.scheduler, node_id=leader.node_id, address=leader.address)
    return replace(before, scheduler=scheduler)


def plan_gateway_again(plan: Plan, part: PartId, settings: Settings, inventory: Inventory) -> GatewayPlan:
    """On a node without a gateway, so that it has the same ports. Raises PlanError."""
    before = next(gateway for gateway in plan.gateways if gateway.process.id.part == part)
    taken = {gateway.process.node_id for gateway in plan.gateways}
    node = _gateway_node(settings, inventory, taken)
    process = replace(before.process, node_id=node.node_id, address=node.address)
    return GatewayPlan(process=process)


def _gateway_node(settings: Settings, inventory: Inventory, taken: Container[str]) -> Node:
    usable = [node for node in inventory.nodes if node.node_id not in taken and not node.server_problem]
    if settings.server.host not in EVERYWHERE or not usable:
        raise PlanError("no other node can have this gateway")
    return usable[0]


def with_freed(inventory: Inventory, bundles: Iterable[Bundle]) -> Inventory:
    """As it would be if these gave their devices back."""
    nodes = {node.node_id: node for node in inventory.nodes}
    for bundle in bundles:
        if (node := nodes.get(bundle.node_id)) is not None:
            num_cpus, num_gpus = node.num_cpus + bundle.num_cpus, node.num_gpus + bundle.num_gpus
            nodes[node.node_id] = replace(node, num_cpus=num_cpus, num_gpus=num_gpus)
    return replace(inventory, nodes=tuple(nodes.values()))


def replica_of(plan: Plan, part: PartId) -> ReplicaPlan:
    return next(replica for replica in plan.replicas if replica.number == part.replica)


def with_replica(plan: Plan, replica: ReplicaPlan) -> Plan:
    """In the place of the one with its number."""
    return replace(plan, replicas=tuple(replica if each.number == replica.number else each for each in plan.replicas))


def with_gateway(plan: Plan, gateway: GatewayPlan) -> Plan:
    """The same for a gateway."""
    gateways = (gateway if each.process.id == gateway.process.id else each for each in plan.gateways)
    return replace(plan, gateways=tuple(gateways))
