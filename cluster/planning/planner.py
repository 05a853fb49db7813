"""Decide which rank runs where, before anything starts.

Pure: settings and an inventory in, a plan or a PlanError out.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from checkpoint.memory import num_sampled_rows, rope_table_bytes, sampling_bytes
from cluster.deployment.settings import ModelSettings, Role, Settings
from cluster.errors import PlanError
from cluster.planning.plan import Bundle, ControlProcess, Inventory, MemoryEstimate, Node, Plan, size_text
from cluster.planning.tiers import tier_notes, with_tiers
from cluster.process_id import ProcessId

_CPU_STEPS = 100  # of a CPU: shares are rounded down to them, so that their sum fits the node


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """A worker process that wants a device."""

    group: Role
    rank: int
    engines: tuple[Role, ...]
    memory: MemoryEstimate

    @property
    def name(self) -> str:
        return f"{self.group} rank {self.rank}"


def make_plan(settings: Settings, inventory: Inventory) -> Plan:
    """Place every rank. Raises PlanError that names the bundle without a place and what each node lacks."""
    if not inventory.nodes:
        raise PlanError("the Ray cluster has no live node; start one, or leave --ray-address out to use a private Ray")
    ranks = _ranks(settings)
    if settings.device == "cuda":
        bundles = with_tiers(_place_on_gpus(settings, inventory, ranks), settings)
        notes = (
            []
            if all(node.gpu_memory_bytes for node in inventory.nodes if node.num_gpus)
            else ["GPU memory is not known, so whether the models fit shows only at start"]
        )
    else:
        placed, notes = _place_on_cpus(settings, inventory, ranks)
        bundles = with_tiers(placed, settings)
    _check_host_memory(bundles, inventory, settings)
    notes += [*_layer_parallel_notes(settings), *_draft_limit_notes(settings), *tier_notes(bundles, settings)]
    leader = bundles[0]
    head = next((node for node in inventory.nodes if node.node_id == inventory.head_node_id), inventory.nodes[0])
    plan = Plan(
        deployment=settings.name,
        device=settings.device,
        bundles=bundles,
        scheduler=ControlProcess(id=ProcessId(role="scheduler"), node_id=leader.node_id, address=leader.address),
        gateway=ControlProcess(id=ProcessId(role="gateway"), node_id=head.node_id, address=head.address),
        eos=settings.target.folder.eos,
        notes=(*settings.notes, *notes),
    )
    return _loopback_if_alone(plan)


def _layer_parallel_notes(settings: Settings) -> list[str]:
    wanted = None if settings.draft is None else settings.draft.layer_parallel
    if wanted is None or wanted.num_ranks > 1:
        return []
    return [f"attention of {wanted.size} draft layers at once is one batched pass on target rank 0"]


def _draft_limit_notes(settings: Settings) -> list[str]:
    if settings.draft is None or settings.max_model_len_of("draft") == settings.max_model_len:
        return []
    limit = settings.max_model_len_of("draft")
    return [f"the draft model's own limit is {limit} tokens: beyond them a seq goes on without its drafts"]


def _loopback_if_alone(plan: Plan) -> Plan:
    """The wires inside have no TLS: on a single machine they stay inside it."""
    addresses = {bundle.address for bundle in plan.bundles} | {plan.scheduler.address, plan.gateway.address}
    if len(addresses) > 1:
        return plan
    return replace(
        plan,
        bundles=tuple(replace(bundle, address="127.0.0.1") for bundle in plan.bundles),
        scheduler=replace(plan.scheduler, address="127.0.0.1"),
        gateway=replace(plan.gateway, address="127.0.0.1"),
    )


def _ranks(settings: Settings) -> list[_Rank]:
    target, draft = settings.target, settings.draft
    ranks = []
    for rank in range(target.tp_size):
        with_draft = draft is not None and settings.colocated and rank < draft.num_ranks
        models = [target, draft] if with_draft and draft is not None else [target]
        ranks.append(_rank("target", rank, models, settings))
    if draft is not None and not settings.colocated:
        ranks += [_rank("draft", rank, [draft], settings) for rank in range(draft.num_ranks)]
    return ranks


def _rank(group: Role, rank: int, models: list[ModelSettings], settings: Settings) -> _Rank:
    memory = MemoryEstimate(
        weight_bytes=sum(model.weight_bytes for model in models),
        kv_cache_bytes=sum(_kv_cache_bytes(model, settings) for model in models),
        # Engines of one device take turns, so only the larger working set counts. Their tables stay.
        activation_bytes=max(_activation_bytes(model, settings) for model in models)
        + sum(_rope_table_bytes(model, settings) for model in models),
    )
    return _Rank(group=group, rank=rank, engines=tuple(model.role for model in models), memory=memory)


def _kv_cache_bytes(model: ModelSettings, settings: Settings) -> int:
    """On cpu what the settings give; on cuda the least that works, one longest seq."""
    if settings.device == "cpu":
        return settings.kv_cache_bytes(model.role)
    # Engines that share a device get blocks for equally many tokens.
    num_tokens = settings.max_model_len if settings.colocated else settings.max_model_len_of(model.role)
    num_blocks = -(-num_tokens // settings.kv_cache.block_size)
    return num_blocks * settings.kv_cache.block_size * model.kv_bytes_per_token


def _activation_bytes(model: ModelSettings, settings: Settings) -> int:
    forward = model.folder.activation_bytes(model.tp_size, num_tokens=settings.scheduler.max_num_batched_tokens)
    return forward + expected_sampling_bytes(model, settings)


def _rope_table_bytes(model: ModelSettings, settings: Settings) -> int:
    num_positions = settings.max_model_len_of(model.role)
    return rope_table_bytes(head_dim=model.folder.config.head_dim, num_positions=num_positions)


def expected_sampling_bytes(model: ModelSettings, settings: Settings) -> int:
    """What a rank of the model reserves for choosing tokens."""
    num_rows = num_sampled_rows(
        verifies=model.role == "target",
        max_num_seqs=settings.max_seqs_of(model.role),
        max_num_batched_tokens=settings.scheduler.max_num_batched_tokens,
    )
    vocab_size = model.folder.config.vocab_size
    return sampling_bytes(vocab_size=vocab_size, num_ranks=model.num_ranks, num_rows=num_rows)


def _place_on_gpus(settings: Settings, inventory: Inventory, ranks: list[_Rank]) -> tuple[Bundle, ...]:
    _check_colocated(settings, inventory.nodes)
    free = {node.node_id: node.num_gpus for node in inventory.nodes}
    nodes = {node.node_id: node for node in inventory.nodes}
    placed: list[tuple[_Rank, Node]] = []
    for group in _groups(ranks):
        usable = {
            node_id: count
            for node_id, count in free.items()
            if _fits_gpu(group[0], nodes[node_id], settings.kv_cache.gpu_memory_utilization)
        }
        chosen = _choose_nodes(len(group), usable, near=placed[0][1].node_id if placed else None, reserve=len(ranks))
        if len(chosen) < len(group):
            raise PlanError(_no_gpu(group[len(chosen)], settings, inventory, placed, chosen))
        for rank, node_id in zip(group, chosen, strict=True):
            free[node_id] -= 1
            placed.append((rank, nodes[node_id]))
    return tuple(_gpu_bundle(rank, node, settings) for rank, node in placed)


def _groups(ranks: list[_Rank]) -> list[list[_Rank]]:
    groups = [[rank for rank in ranks if rank.group == role] for role in ("target", "draft")]
    return [group for group in groups if group]


def _check_colocated(settings: Settings, nodes: Iterable[Node]) -> None:
    """Two engines on one device divide its memory beforehand, so its size must be known."""
    if settings.colocated and any(node.num_gpus and node.gpu_memory_bytes is None for node in nodes):
        raise PlanError(
            "placement: colocated needs the GPUs' memory size, and GPU memory is not known on every node; "
            "install nvidia-smi there or use placement: separate"
        )


def _fits_gpu(rank: _Rank, node: Node, utilization: float) -> bool:
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


def _gpu_bundle(rank: _Rank, node: Node, settings: Settings) -> Bundle:
    memory = rank.memory
    if node.gpu_memory_bytes is not None:
        budget = int(node.gpu_memory_bytes * settings.kv_cache.gpu_memory_utilization)
        memory = replace(memory, kv_cache_bytes=budget - memory.weight_bytes - memory.activation_bytes)
    return Bundle(
        group=rank.group,
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
    rank: _Rank, settings: Settings, inventory: Inventory, placed: list[tuple[_Rank, Node]], chosen: list[str]
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


def _place_on_cpus(
    settings: Settings, inventory: Inventory, ranks: list[_Rank]
) -> tuple[tuple[Bundle, ...], list[str]]:
    """Whole cores for every rank if the cluster has them, else an equal share of each node for its ranks."""
    threads = settings.cpu.threads_per_worker
    free = {node.node_id: int(node.num_cpus / threads) for node in inventory.nodes}
    if sum(free.values()) >= len(ranks):
        places: list[str] = []
        for group in _groups(ranks):
            chosen = _choose_nodes(len(group), free, near=places[0] if places else None, reserve=len(ranks))
            for node_id in chosen:
                free[node_id] -= 1
            places += chosen
    else:
        places = _share_cpus(inventory, ranks)
    return _cpu_bundles(settings, inventory, ranks, places)


def _share_cpus(inventory: Inventory, ranks: list[_Rank]) -> list[str]:
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
    settings: Settings, inventory: Inventory, ranks: list[_Rank], places: list[str]
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


def _check_host_memory(bundles: Iterable[Bundle], inventory: Inventory, settings: Settings) -> None:
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
