"""The specs of the processes of a deployment, from its settings and where each runs. Pure."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from cluster.deployment.settings import Role, Settings
from cluster.layer_parallel import LayerParallel
from cluster.planning.plan import Bundle, ControlProcess, GatewayPlan
from cluster.process_id import PartId
from echelon import __version__
from echelon.pb import process_pb2, worker_pb2

ENGINE_ROLES = {"target": worker_pb2.ENGINE_ROLE_TARGET, "draft": worker_pb2.ENGINE_ROLE_DRAFT}


def worker_specs(settings: Settings, bundles: Sequence[Bundle], incarnation: int) -> list[process_pb2.WorkerSpec]:
    """One spec for each rank of a group. The store's address is filled in once the leader has opened it."""
    return [
        process_pb2.WorkerSpec(
            name=bundle.name,
            rank=bundle.rank,
            world_size=len(bundles),
            host=bundle.address,
            device=settings.device,
            threads=settings.cpu.threads_per_worker,
            compile=settings.cpu.compile,
            cpu_ids=bundle.cpu_ids,
            incarnation=incarnation,
            version=__version__,
            # Every rank is told of every engine: a rank beyond an engine's tp_size only follows the rounds.
            engines=[_engine_spec(settings, role, bundles[0]) for role in bundles[0].engines],
            collective_timeout_s=settings.collective_timeout_s,
        )
        for bundle in bundles
    ]


def _engine_spec(settings: Settings, role: Role, bundle: Bundle) -> process_pb2.EngineSpec:
    model = settings.model(role)
    spec = process_pb2.EngineSpec(
        role=ENGINE_ROLES[role],
        model=str(model.folder.path),
        dtype=model.dtype,
        tp_size=model.tp_size,
        block_size=settings.kv_cache.block_size,
        kv_cache_bytes=_kv_cache_bytes(settings, role, bundle),
        gpu_memory_utilization=settings.kv_cache.gpu_memory_utilization,
        max_num_seqs=settings.max_seqs_of(role),
        max_num_batched_tokens=settings.scheduler.max_num_batched_tokens,
        max_model_len=settings.max_model_len_of(role),
        batch_invariant=settings.batch_invariant,
        forced_acceptance=settings.forced_acceptance if role == "target" else 0.0,
        quantization="" if model.folder.quantization is None else model.folder.quantization.format,
        keeps_bits=model.folder.keeps_bits,
        lower_draft=model.lower_draft,
        lower_model="" if model.lower is None else str(model.lower.folder.path),
        num_layers=model.folder.config.num_layers if role == "draft" else 0,
        captured_new_tokens=settings.captured_new_tokens_of(role),
        kv_dtype=model.kv_dtype,
        attention=settings.attention,
    )
    if model.layer_parallel is not None:
        _add_layer_parallel(spec, model.layer_parallel)
    if bundle.num_host_slots:
        spec.tiers.CopyFrom(_tier_spec(settings, role, bundle))
    return spec


def _tier_spec(settings: Settings, role: Role, bundle: Bundle) -> process_pb2.TierSpec:
    disk = settings.kv_cache.disk
    spec = process_pb2.TierSpec(num_host_slots=bundle.num_host_slots, tier_dtype=settings.kv_cache.tier_dtype)
    if disk is not None:
        spec.disk_path = disk.path
        spec.disk_bytes = bundle.disk_bytes[role]
        spec.disk_read_only = disk.read_only
        spec.disk_node_bytes = disk.bytes
        spec.replica = bundle.replica
    return spec


def _add_layer_parallel(spec: process_pb2.EngineSpec, wanted: LayerParallel) -> None:
    spec.lp_size = wanted.size
    spec.layer_groups.extend(worker_pb2.LayerGroup(layers=group) for group in wanted.groups or ())
    spec.layer_parallel_weights = wanted.weights
    spec.layer_parallel_mlp = wanted.mlps


def _kv_cache_bytes(settings: Settings, role: Role, bundle: Bundle) -> int:
    """Per rank; 0 on cuda, where an engine that is alone on its device takes what its weights leave."""
    if settings.device == "cpu" or len(bundle.engines) == 1:
        return settings.kv_cache_bytes(role)
    # Engines that share a GPU get blocks for the same number of tokens.
    per_token = {engine: settings.model(engine).held_kv_bytes_per_token for engine in bundle.engines}
    block_bytes = settings.kv_cache.block_size * sum(per_token.values())
    return bundle.memory.kv_cache_bytes // block_bytes * settings.kv_cache.block_size * per_token[role]


def scheduler_spec(
    settings: Settings,
    *,
    process: ControlProcess,
    target: process_pb2.GroupEndpoint,
    draft: process_pb2.GroupEndpoint | None,
) -> process_pb2.SchedulerSpec:
    return process_pb2.SchedulerSpec(
        name=process.name,
        host=process.address,
        port=0,
        version=__version__,
        model_name=settings.model_name,
        tokenizer_dir=str(settings.target.folder.path),
        eos_token_ids=settings.target.folder.eos_token_ids,
        target=target,
        draft=draft,
        speculation=process_pb2.SpeculationSpec(**asdict(settings.speculation)),
        scheduler=process_pb2.SchedulerSection(**asdict(settings.scheduler)),
        round_timeout_s=settings.round_timeout_s,
        max_rounds_in_flight=settings.max_rounds_in_flight,
        tiers=_tier_section(settings),
        max_live_slowdown=settings.jobs.max_live_slowdown,
        keeps_requests=settings.rebuild,
    )


def _tier_section(settings: Settings) -> process_pb2.TierSection:
    disk = settings.kv_cache.disk
    return process_pb2.TierSection(
        load_timeout_s=settings.kv_cache.load_timeout_s,
        stores_on_evict=settings.kv_cache.store == "on_evict",
        writes_disk=disk is not None and not disk.read_only,
        writes_at_once=disk is not None and disk.write == "all",
    )


def model_id(settings: Settings) -> str:
    """Of the target as requests are read and served: replicas with the same may go on with each other's requests."""
    folder = settings.target.folder
    facts = (folder.path, folder.config, folder.dtype, folder.eos, sorted(folder.weights.items()), settings.model_name)
    return hashlib.blake2b(repr((*facts, settings.max_model_len)).encode(), digest_size=8).hexdigest()


def gateway_model(settings: Settings) -> process_pb2.GatewayModel:
    return process_pb2.GatewayModel(
        model_id=model_id(settings),
        model_name=settings.model_name,
        model_dir=str(settings.target.folder.path),
        max_model_len=settings.max_model_len,
        vocab_size=settings.target.folder.config.vocab_size,
        models=_served_models(settings),
    )


def gateway_spec(
    settings: Settings,
    gateway: GatewayPlan,
    *,
    scheduler_addresses: Sequence[str],
    processes: Iterable[process_pb2.PlacedProcess],
) -> process_pb2.GatewaySpec:
    model = gateway_model(settings)
    spec = process_pb2.GatewaySpec(
        name=gateway.process.name,
        server=process_pb2.ServerSection(**asdict(settings.server.at(gateway.port_offset))),
        version=__version__,
        model_id=model.model_id,
        model_name=model.model_name,
        model_dir=model.model_dir,
        scheduler_addresses=scheduler_addresses,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        keeps_requests=settings.rebuild,
        inside_host=gateway.process.address,
        processes=processes,
        models=model.models,
    )
    if settings.jobs.path and gateway.process.id.replica == 0:  # one process owns the folder
        num_slots = settings.scheduler.max_num_seqs * settings.num_replicas
        spec.jobs.CopyFrom(
            process_pb2.JobsSection(
                path=settings.jobs.path,
                max_bytes=settings.jobs.max_bytes,
                max_running=settings.jobs.max_running or num_slots,
                retention_s=settings.jobs.retention_s,
            )
        )
    return spec


def names_by_part(processes: Iterable[Bundle | ControlProcess]) -> dict[PartId, list[str]]:
    """The processes of each part; those of a group by rank."""
    names: dict[PartId, list[str]] = {}
    for process in processes:
        names.setdefault(process.id.part, []).append(process.name)
    return names


def placed_processes(
    processes: Iterable[Bundle | ControlProcess], devices_of: Callable[[str], str]
) -> list[process_pb2.PlacedProcess]:
    """For people. `devices_of`: what the process of a name was given."""
    return [
        process_pb2.PlacedProcess(
            name=process.name,
            role=process.id.role,
            replica=process.id.replica,
            rank=process.id.rank or 0,
            node=process.address,
            devices=devices_of(process.name),
            engines=[ENGINE_ROLES[role] for role in process.engines] if isinstance(process, Bundle) else (),
        )
        for process in processes
    ]


def _served_models(settings: Settings) -> Iterator[process_pb2.ServedModel]:
    roles: tuple[Role, ...] = ("target",) if settings.draft is None else ("target", "draft")
    for role in roles:
        model = settings.model(role)
        rounded = model.folder.quantization
        yield process_pb2.ServedModel(
            engine=ENGINE_ROLES[role],
            model=model.folder.path.name,
            dtype=model.dtype if rounded is None else rounded.format,
            num_ranks=model.tp_size if model.layer_parallel is None else model.layer_parallel.num_ranks,
            parallel="tensor" if model.layer_parallel is None else "layer",
        )
