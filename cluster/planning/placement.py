"""Which rank runs on which device of which node. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from cluster.deployment.settings import Role, Settings
from cluster.errors import PlanError
from cluster.planning.plan import Bundle, Inventory, Node, size_text
from cluster.planning.ranks import Rank

_CPU_STEPS = 100  # of a CPU: shares are rounded down to them, so that their sum fits the node


def place_on_gpus(settings: Settings, inventory: Inventory, ranks: list[Rank]) -> tuple[Bundle, ...]:
    _check_colocated(settings, inventory.nodes)
    free = {node.node_id: node.num_gpus for node in inventory.nodes}
    nodes = {node.node_id: node for node in inventory.nodes}
    placed: list[tuple[Rank, Node]] = []
    for group in _groups(ranks):
        beside = [node.node_id for rank, node in placed if rank.replica == group[0].replica]
        usable = {
            node_id: count
            for node_id, count in free.items()
            if _fits_gpu(group[0], nodes[node_id], settings.kv_cache.gpu_memory_utilization)
        }
        reserve = _replica_size(ranks)
        chosen = _choose_nodes(len(group), usable, near=beside[0] if beside else None, reserve=reserve)
        if len(chosen) < len(group):
            raise PlanError(_no_gpu(group[len(chosen)], settings, inventory, placed, chosen))
        for rank, node_id in zip(group, chosen, strict=True):
            free[node_id] -= 1
            placed.append((rank, nodes[node_id]))
    return tuple(_gpu_bundle(rank, node, settings) for rank, node in placed)


def _replica_size(ranks: list[Rank]) -> int:
    return sum(rank.replica == ranks[0].replica for rank in ranks)


def _groups(ranks: list[Rank]) -> list[list[Rank]]:
    """One replica after the other, each with its target first."""
    groups: dict[tuple[int, Role], list[Rank]] = {}
    for rank in ranks:
        groups.setdefault((rank.replica, rank.group), []).append(rank)
    return list(groups.values())


def _check_colocated(settings: Settings, nodes: Iterable[Node]) -> None:
    """Two engines on one device divide its memory beforehand, so its size must be known."""
    if settings.colocated and any(node.num_gpus and node.gpu_memory_bytes is None for node in nodes):
        raise PlanError(
            "placement: colocated needs the GPUs' memory size, and GPU memory is not known on every node; "
            "install nvidia-smi there or use placement: separate"
        )


def _fits_gpu(rank: Rank, node: Node, utilization: float) -> bool:
    return node.gpu_memory_bytes is None or rank.memory.total_bytes <= node.gpu_memory_bytes * utilization


def _choose_nodes(count: int, free: Mapping[str, int], *, near: str | None, reserve: int) -> list[str]:
    """A node id for each of `count` ranks, fewer where devices run out.

    One node for the whole group where there is one: `near` if it has room, else the fullest that still has room for
    `reserve` devices (so that the next group fits beside this one), else the fullest that holds the group. Otherwise
    the group spreads over as few nodes as possible.
    """
    if near is not None and free.get(near, 0) >= count:
        return [near] * count
    for wanted in (reserve, count):
        holders = [node_id for node_id, devices in free.items() if devices >= wanted]
        if holders:
            return [min(holders, key=lambda node_id: free[node_id])] * count
    largest_first = sorted(free, key=lambda node_id: -free[node_id])
    return [node_id for node_id in largest_first for _ in range(free[node_id])][:count]


def _gpu_bundle(rank: Rank, node: Node, settings: Settings) -> Bundle:
    memory = rank.memory
    if node.gpu_memory_bytes is not None:
        budget = int(node.gpu_memory_bytes * settings.kv_cache.gpu_memory_utilization)
        memory = replace(memory, kv_cache_bytes=budget - memory.weight_bytes - memory.activation_bytes)
    return Bundle(
        group=rank.group,
        replica=rank.replica,
        rank=rank.rank,
        engines=rank.engines,
        node_id=node.node_id,
        address=node.address,
        num_gpus=1,
        num_cpus=0.0,
        cpu_ids=(),
        memory=memory,
    )


def _no_gpu(
    rank: Rank, settings: Settings, inventory: Inventory, placed: list[tuple[Rank, Node]], chosen: list[str]
) -> str:
    taken = Counter([node.node_id for _, node in placed] + chosen)
    reasons = []
    for node in inventory.nodes:
        if not node.num_gpus:
            reasons.append(f"node {node.label}: no free GPU")
        elif not _fits_gpu(rank, node, settings.kv_cache.gpu_memory_utilization):
            have = (node.gpu_memory_bytes or 0) * settings.kv_cache.gpu_memory_utilization
            reasons.append(f"node {node.label}: {size_text(have)} a GPU at this gpu_memory_utilization")
        else:
            reasons.append(f"node {node.label}: {node.num_gpus} free, {taken[node.node_id]} of them planned already")
    need = rank.memory
    sizes = f"weights {size_text(need.weight_bytes)}, KV cache {size_text(need.kv_cache_bytes)}, "
    sizes += f"activations {size_text(need.activation_bytes)}"
    remedy = "free or add GPUs, lower tensor_parallel_size"
    remedy += " or use placement: colocated" if rank.group == "draft" else ", or lower scheduler.max_model_len"
    if not any(node.num_gpus for node in inventory.nodes):
        remedy += "; to run on cores, set device: cpu"
    return f"no place for {rank.name}: it needs 1 GPU with {size_text(need.total_bytes)} ({sizes}); " + "; ".join(
        [*reasons, remedy]
    )


def place_on_cpus(settings: Settings, inventory: Inventory, ranks: list[Rank]) -> tuple[tuple[Bundle, ...], list[str]]:
    """Whole cores for every rank if the cluster has them, else an equal share of each node for its ranks."""
    threads = settings.cpu.threads_per_worker
    free = {node.node_id: int(node.num_cpus / threads) for node in inventory.nodes}
    if sum(free.values()) >= len(ranks):
        places: list[str] = []
        leaders: dict[int, str] = {}  # the node of each replica's target
        for group in _groups(ranks):
            near, reserve = leaders.get(group[0].replica), _replica_size(ranks)
            chosen = _choose_nodes(len(group), free, near=near, reserve=reserve)
            for node_id in chosen:
                free[node_id] -= 1
            leaders.setdefault(group[0].replica, chosen[0])
            places += chosen
    else:
        places = _share_cpus(inventory, ranks)
    return _cpu_bundles(settings, inventory, ranks, places)


def _share_cpus(inventory: Inventory, ranks: list[Rank]) -> list[str]:
    """Each rank in turn to the node where its share is largest."""
    cpus = {node.node_id: node.num_cpus for node in inventory.nodes if node.num_cpus > 0}
    if not cpus:
        labels = ", ".join(node.label for node in inventory.nodes)
        raise PlanError(
            f"no place for {ranks[0].name}: no free CPU on node {labels}; stop something or add a node with CPUs"
        )
    taken: Counter[str] = Counter()
    for _ in ranks:
        taken[max(cpus, key=lambda node_id: cpus[node_id] / (taken[node_id] + 1))] += 1
    # Ranks of a group stay together: the nodes are filled in order, the fullest first.
    return [node_id for node_id, count in taken.most_common() for _ in range(count)]


def _cpu_bundles(
    settings: Settings, inventory: Inventory, ranks: list[Rank], places: list[str]
) -> tuple[tuple[Bundle, ...], list[str]]:
    nodes = {node.node_id: node for node in inventory.nodes}
    ranks_on = Counter(places)
    pins, notes = _pin(settings.cpu.threads_per_worker, [nodes[node_id] for node_id in places])
    bundles = []
    for rank, node_id, cpu_ids in zip(ranks, places, pins, strict=True):
        node = nodes[node_id]
        fair_share = int(node.num_cpus / ranks_on[node_id] * _CPU_STEPS) / _CPU_STEPS
        bundles.append(
            Bundle(
                group=rank.group,
                replica=rank.replica,
                rank=rank.rank,
                engines=rank.engines,
                node_id=node_id,
                address=node.address,
                num_gpus=0,
                num_cpus=min(float(settings.cpu.threads_per_worker), fair_share),
                cpu_ids=cpu_ids,
                memory=rank.memory,
            )
        )
    return tuple(bundles), notes


def _pin(threads: int, places: list[Node]) -> tuple[list[tuple[int, ...]], list[str]]:
    """Cores for each place, and notes on machines with too few. Ray nodes of one address share its cores."""
    ranks_on = Counter(node.address for node in places)
    cores = {node.address: list(node.cores) for node in places}
    notes = []
    for address, count in ranks_on.items():
        if len(cores[address]) < count * threads:
            idle = f"{len(cores[address])} are idle" if cores[address] else "some are busy"
            notes.append(f"cores are shared on {address}: {count} workers need {count * threads} cores, {idle}")
            cores[address] = []
    pins = []
    for node in places:
        pins.append(tuple(cores[node.address][:threads]))
        del cores[node.address][:threads]
    return pins, notes
