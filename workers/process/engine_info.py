"""What a worker tells the scheduler of an engine."""

from echelon.pb.process_pb2 import EngineSpec
from echelon.pb.worker_pb2 import EngineInfo, LayerGroup
from workers.engine.kv_cache import KVLayout
from workers.models.decoder import CausalLM
from workers.models.layer_groups import LayerParallelPlan
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.process.lower_level import LoadedLower
from workers.process.tier_setup import block_in_tiers, tier_dtype


def describe_engine(
    spec: EngineSpec,
    model: CausalLM | LayerParallelLM,
    layout: KVLayout,
    lower: LoadedLower | None,
    *,
    num_blocks: int,
    num_host_slots: int,
    num_disk_blocks: int,
    load_s: float,
) -> EngineInfo:
    """Of a loaded engine with so many blocks in its tiers. `lower`: the model beneath a draft."""
    in_tiers = block_in_tiers(spec, layout)
    info = EngineInfo(
        role=spec.role,
        model=spec.model,
        dtype=spec.dtype,
        tp_size=spec.tp_size,
        lp_size=1,
        vocab_size=model.config.vocab_size,
        num_blocks=num_blocks,
        block_size=spec.block_size,
        num_slots=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        weight_bytes=model.weight_bytes,
        kv_cache_bytes=num_blocks * layout.block_bytes,
        load_s=load_s,
        block_bytes=layout.block_bytes,
        num_host_slots=num_host_slots,
        num_disk_blocks=num_disk_blocks,
        tier_dtype=tier_dtype(spec),
        kv_dtype=spec.kv_dtype or "auto",
        attention=spec.attention or "full",
        host_block_bytes=in_tiers.host_bytes,
        disk_block_bytes=in_tiers.disk_bytes,
        batch_invariant=spec.batch_invariant,
        quantization=spec.quantization,
        lower_draft=spec.lower_draft,
        num_layers=model.config.num_layers,
    )
    if lower is not None:
        info.lower_weight_bytes = lower.model.weight_bytes
        info.lower_kv_cache_bytes = num_blocks * lower.layout.block_bytes
    if isinstance(model, LayerParallelLM):
        _describe_layers(model.plan, info)
    return info


def _describe_layers(plan: LayerParallelPlan, info: EngineInfo) -> None:
    info.lp_size = plan.lp_size
    info.layer_groups.extend(LayerGroup(layers=group) for group in plan.groups)
    info.layer_parallel_weights = plan.weights
    info.layer_parallel_mlp = plan.mlps
