"""Decide which rank runs where, before anything starts.

Pure: settings and an inventory in, a plan or a PlanError out.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from cluster.deployment.settings import ServerSettings, Settings
from cluster.errors import PlanError
from cluster.planning.notes import model_notes
from cluster.planning.placement import place_on_cpus, place_on_gpus
from cluster.planning.plan import Bundle, ControlProcess, GatewayPlan, Inventory, Node, Plan, ReplicaPlan, size_text
from cluster.planning.ranks import Rank, ranks_of
from cluster.planning.tiers import check_disks, tier_notes, with_tiers, with_tiers_of
from cluster.process_id import ProcessId

_LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")


def make_plan(settings: Settings, inventory: Inventory) -> Plan:
    """Place every rank. Raises PlanError that names the bundle without a place and what each node lacks."""
    if not inventory.nodes:
        raise PlanError("the Ray cluster has no live node; start one, or leave --ray-address out to use a private Ray")
    ranks = [rank for replica in range(settings.num_replicas) for rank in ranks_of(settings, replica)]
    placed, notes = place_ranks(settings, inventory, ranks)
    bundles = with_tiers(placed, settings)
    check_host_memory(bundles, inventory, settings)
    check_disks(bundles, inventory, settings)
    notes += [*model_notes(settings), *tier_notes(bundles, settings)]
    head = next((node for node in inventory.nodes if node.node_id == inventory.head_node_id), inventory.nodes[0])
    plan = Plan(
        deployment=settings.name,
        device=settings.device,
        replicas=tuple(_replica(number, bundles) for number in range(settings.num_replicas)),
        gateways=_place_gateways(settings.server, head, inventory.nodes),
        http_url=settings.http_url(head.address),
        eos=settings.target.folder.eos,
        notes=(*settings.notes, *notes),
    )
    return _loopback_if_alone(plan)


def plan_more(plan: Plan, settings: Settings, inventory: Inventory, num_replicas: int) -> Plan:
    """The plan with so many replicas, the new ones on what is free now. Raises PlanError."""
    numbers = _free_numbers(plan, num_replicas - len(plan.replicas))
    ranks = [rank for replica in numbers for rank in ranks_of(settings, replica)]
    placed, _ = place_ranks(settings, inventory, ranks)
    bundles = with_tiers_of(placed, plan.replicas[0].bundles)
    check_host_memory(bundles, inventory, settings)
    check_disks(bundles, inventory, settings)
    more = [_replica(number, bundles) for number in numbers]
    return replace(plan, replicas=(*plan.replicas, *(loopback_beside(plan.gateways, replica) for replica in more)))


def plan_changed(plan: Plan, settings: Settings, inventory: Inventory) -> ReplicaPlan:
    """A replica with other settings than those of `plan`, on what is free now. Raises PlanError."""
    (number,) = _free_numbers(plan, 1)
    placed, _ = place_ranks(settings, inventory, ranks_of(settings, number))
    bundles = with_tiers(placed, replace(settings, num_replicas=1))
    check_host_memory(bundles, inventory, settings)
    check_disks(bundles, inventory, settings)
    return loopback_beside(plan.gateways, _replica(number, bundles))


def _free_numbers(plan: Plan, count: int) -> list[int]:
    taken = {replica.number for replica in plan.replicas}
    return list(itertools.islice((number for number in itertools.count() if number not in taken), count))


def place_ranks(settings: Settings, inventory: Inventory, ranks: list[Rank]) -> tuple[tuple[Bundle, ...], list[str]]:
    """The bundles, and notes for a person."""
    if settings.device == "cpu":
        return place_on_cpus(settings, inventory, ranks)
    is_known = all(node.gpu_memory_bytes for node in inventory.nodes if node.num_gpus)
    notes = [] if is_known else ["GPU memory is not known, so whether the models fit shows only at start"]
    return place_on_gpus(settings, inventory, ranks), notes


def _replica(number: int, bundles: Iterable[Bundle]) -> ReplicaPlan:
    """The scheduler runs beside the leader of its target."""
    own = tuple(bundle for bundle in bundles if bundle.replica == number)
    process = ProcessId(role="scheduler", replica=number)
    scheduler = ControlProcess(id=process, node_id=own[0].node_id, address=own[0].address)
    return ReplicaPlan(bundles=own, scheduler=scheduler)


def _place_gateways(server: ServerSettings, head: Node, nodes: Iterable[Node]) -> tuple[GatewayPlan, ...]:
    """On the head first, then on one node after the other if they listen on all interfaces: other addresses are those
    of one machine. Raises PlanError."""
    others = [node for node in nodes if node is not head] if server.host in EVERYWHERE else []
    places = [head, *others]
    gateways = []
    for number in range(server.gateways):
        port_offset, place = divmod(number, len(places))
        node = places[place]
        if node.server_problem:
            raise PlanError(f"{node.server_problem}; a gateway runs on node {node.label}")
        process = ProcessId(role="gateway", replica=number)
        control = ControlProcess(id=process, node_id=node.node_id, address=node.address)
        gateways.append(GatewayPlan(process=control, port_offset=port_offset))
    return tuple(gateways)


def _loopback_if_alone(plan: Plan) -> Plan:
    """The wires inside have no TLS: on a single machine they stay inside it."""
    if len({process.address for process in plan.processes}) > 1:
        return plan
    gateways = tuple(replace(each, process=replace(each.process, address=_LOOPBACK)) for each in plan.gateways)
    return replace(plan, replicas=tuple(_on_loopback(replica) for replica in plan.replicas), gateways=gateways)


def loopback_beside(gateways: Iterable[GatewayPlan], replica: ReplicaPlan) -> ReplicaPlan:
    """The same for a replica that comes later: nobody but the gateways talks to it."""
    nodes = {gateway.process.node_id for gateway in gateways} | {process.node_id for process in replica.processes}
    is_alone = len(nodes) == 1
    return _on_loopback(replica) if is_alone else replica


def _on_loopback(replica: ReplicaPlan) -> ReplicaPlan:
    bundles = tuple(replace(bundle, address=_LOOPBACK) for bundle in replica.bundles)
    return ReplicaPlan(bundles=bundles, scheduler=replace(replica.scheduler, address=_LOOPBACK))


def check_host_memory(bundles: Iterable[Bundle], inventory: Inventory, settings: Settings) -> None:
    """What all workers of a node take of its memory must be free. Device memory on cpu is the node's own."""
    addresses = {node.node_id: node.address for node in inventory.nodes}
    needed: Counter[str] = Counter()
    for bundle in bundles:
        device_bytes = bundle.memory.total_bytes if settings.device == "cpu" else 0
        needed[addresses[bundle.node_id]] += device_bytes + bundle.memory.host_bytes
    for node in inventory.nodes:
        if node.memory_bytes is not None and needed[node.address] > node.memory_bytes:
            names = ", ".join(bundle.name for bundle in bundles if addresses[bundle.node_id] == node.address)
            raise PlanError(
                f"no place for {names} on node {node.label}: they need {size_text(needed[node.address])} of memory, "
                f"{size_text(node.memory_bytes)} is free; lower {_host_memory_keys(settings)}"
            )


def _host_memory_keys(settings: Settings) -> str:
    """What a person can lower."""
    keys = ["kv_cache.cpu_bytes"] if settings.kv_cache.cpu_bytes else []
    if settings.device == "cpu":
        keys += ["kv_cache.device_bytes", "scheduler.max_num_batched_tokens"]
    return " or ".join(keys)
