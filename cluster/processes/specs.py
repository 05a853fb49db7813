"""The specs of the processes of a deployment, from its settings and where each runs. Pure."""

from collections.abc import Sequence
from dataclasses import asdict

from cluster.deployment.settings import Role, Settings
from cluster.layer_parallel import LayerParallel
from cluster.planning.plan import Bundle, ControlProcess
from echelon import __version__
from echelon.pb import process_pb2, worker_pb2

_ROLES = {"target": worker_pb2.ENGINE_ROLE_TARGET, "draft": worker_pb2.ENGINE_ROLE_DRAFT}


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
        role=_ROLES[role],
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
    )
    if model.layer_parallel is not None:
        _add_layer_parallel(spec, model.layer_parallel)
    if bundle.num_host_slots:
        spec.tiers.CopyFrom(_tier_spec(settings, role, bundle))
    return spec


def _tier_spec(settings: Settings, role: Role, bundle: Bundle) -> process_pb2.TierSpec:
    disk = settings.kv_cache.disk
    spec = process_pb2.TierSpec(num_host_slots=bundle.num_host_slots)
    if disk is not None:
        block_bytes = settings.kv_cache.block_size * settings.model(role).kv_bytes_per_token
        spec.disk_path = disk.path
        spec.disk_bytes = bundle.num_disk_blocks * block_bytes
        spec.disk_read_only = disk.read_only
        spec.disk_node_bytes = disk.bytes
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
    per_token = {engine: settings.model(engine).kv_bytes_per_token for engine in bundle.engines}
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
    )


def _tier_section(settings: Settings) -> process_pb2.TierSection:
    disk = settings.kv_cache.disk
    return process_pb2.TierSection(
        load_timeout_s=settings.kv_cache.load_timeout_s,
        writes_disk=disk is not None and not disk.read_only,
        writes_at_once=disk is not None and disk.write == "all",
    )


def gateway_spec(
    settings: Settings, process: ControlProcess, *, scheduler_addresses: Sequence[str]
) -> process_pb2.GatewaySpec:
    return process_pb2.GatewaySpec(
        name=process.name,
        server=process_pb2.ServerSection(**asdict(settings.server)),
        version=__version__,
        model_name=settings.model_name,
        model_dir=str(settings.target.folder.path),
        scheduler_addresses=scheduler_addresses,
        max_model_len=settings.max_model_len,
        vocab_size=settings.target.folder.config.vocab_size,
    )
