"""Turns the spec of a worker into engines that are ready for rounds."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from checkpoint.memory import num_sampled_rows, sampling_bytes
from checkpoint.quantization import WeightFormat
from childproc.spec import SpecError
from echelon.pb.process_pb2 import EngineSpec, WorkerSpec
from echelon.pb.worker_pb2 import EngineRole
from kernels.kv.block_copy import cache_addresses
from kernels.native.linear import why_not
from workers.captured.captured_model import CapturedModel
from workers.collectives import Group
from workers.engine.draft_engine import DraftEngine
from workers.engine.engine import Engine, ModelRunner
from workers.engine.kv_cache import KVLayout, activation_bytes, check_num_blocks
from workers.engine.seq_state import Limits, SeqTable
from workers.engine.target_engine import TargetEngine
from workers.engine.warm_up import warm_up, warm_up_moves
from workers.models.checkpoint import Progress
from workers.models.decoder import CausalLM
from workers.models.fp8_caches import use_fp8_caches
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.models.loading import load_layer_parallel_model, load_model
from workers.process.batch_invariance import choose_batch_invariance, keeps_batch_invariance
from workers.process.capturing import agree_on_steps, capture_steps, reserved_captured_bytes
from workers.process.cohort import Cohort
from workers.process.draft_layout import is_layer_parallel, num_ranks, quantization_of, resolve_plan
from workers.process.engine_info import describe_engine
from workers.process.lower_level import LoadedLower, build_lower, check_lower, load_lower
from workers.process.tier_setup import (
    build_host,
    build_host_attention,
    build_mover,
    has_disk,
    is_budgeted,
    kv_facts,
    num_tokens_on_device,
    open_store,
    staging_bytes,
    weights_fingerprint,
)
from workers.sampling.grammar import GrammarCompiler
from workers.sampling.sampler import Sampler
from workers.tiers.segment_store import SegmentStore
from workers.trace import Tracer

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ROLE_NAMES = {EngineRole.ENGINE_ROLE_TARGET: "target", EngineRole.ENGINE_ROLE_DRAFT: "draft"}

OnProgress = Callable[[str, int, int], None]  # stage, done, total
Agree = Callable[[CapturedModel | None], CapturedModel | None]
Engines = dict[EngineRole.ValueType, Engine]


class _LoadOptions(TypedDict):
    """Settings for loading a model, however its ranks share it."""

    dtype: torch.dtype
    device: torch.device
    group: Group
    max_model_len: int
    batch_invariant: bool
    quantization: WeightFormat | None
    num_layers: int
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A model whose KV cache is not sized yet."""

    spec: EngineSpec
    model: CausalLM | LayerParallelLM
    group: Group
    layout: KVLayout
    kv_scales: str  # a digest; empty: the cache has the dtype of the weights
    load_s: float
    lower: LoadedLower | None  # beneath a draft

    @property
    def block_bytes(self) -> int:
        """Of a block on the device, with that of the model beneath."""
        return self.layout.block_bytes + (self.lower.layout.block_bytes if self.lower else 0)


class _Sizes(NamedTuple):
    """Of an engine's tiers, in blocks."""

    num_blocks: int
    num_host_slots: int
    num_disk_blocks: int


def load_engines(spec: WorkerSpec, cohort: Cohort, on_progress: OnProgress) -> Engines:
    """The engines of this rank. All ranks call it; a rank that takes no part in an engine does not get it.

    Raises:
        LoadError: A model folder cannot be served as requested; names tensor, shape or bytes.
        KVCacheError: Too little memory for one sequence, or for the host tier.
        StoreError: The folder of a disk tier cannot be used.
        SpecError: A field of the spec is wrong.
    """
    device = torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        on_progress("preparing native kernels", 0, 0)  # the first start on a machine compiles them
    if device.type == "cpu" and (reason := why_not()):
        logger.info("products and attention run through torch, which is slower for few rows: %s", reason)
    loaded = [_load(engine, cohort, device, on_progress) for engine in spec.engines]
    present = [entry for entry in loaded if entry is not None]
    own_blocks = _own_num_blocks(present, device)
    engines: Engines = {}
    for index, (engine, entry) in enumerate(zip(spec.engines, loaded, strict=True)):
        store = _open_store(engine, entry, cohort, f"weights/{index}", device, on_progress)
        own = None
        if entry is not None:
            num_disk_blocks = store.capacity if store else 0
            own = _Sizes(own_blocks[engine.role], engine.tiers.num_host_slots, num_disk_blocks)
        sizes = _least(own, cohort, f"sizes/{index}")
        agree = partial(agree_on_steps, cohort=cohort, key=f"captured/{index}", takes_part=entry is not None)
        if entry is None:
            agree(None)
        else:
            engines[engine.role] = _build(entry, sizes, store, device, cohort.tracer, agree, on_progress)
    return engines


def _open_store(
    spec: EngineSpec, entry: _Loaded | None, cohort: Cohort, key: str, device: torch.device, on_progress: OnProgress
) -> SegmentStore | None:
    """The disk tier of an engine on this rank, if it has one. All ranks call it."""
    if not has_disk(spec):
        return None
    role = _ROLE_NAMES[spec.role]
    on_progress(f"opening the disk tier of the {role}", 0, 0)
    members = num_ranks(spec, cohort.world_size)
    weights = weights_fingerprint(spec, cohort, key, num_ranks=members)
    kv_scales = cohort.gather(f"{key}/kv_scales", "" if entry is None else entry.kv_scales)
    if entry is None:
        return None
    plan = entry.model.plan if isinstance(entry.model, LayerParallelLM) else None
    facts = kv_facts(entry.spec, plan, num_ranks=members, weights=weights, device=device)
    facts |= {"kv_scales": " ".join(kv_scales).strip()}
    return open_store(spec, entry.layout, facts, role=role, rank=cohort.rank, num_ranks=members)


def _least(own: _Sizes | None, cohort: Cohort, key: str) -> _Sizes:
    """The smallest sizes that a rank of an engine has. All ranks call it; one that does not run the engine has None."""
    everyone = cohort.gather(key, " ".join(map(str, own or ())))
    return _Sizes(
        *(min(numbers) for numbers in zip(*(map(int, text.split()) for text in everyone if text), strict=True))
    )


def _load(spec: EngineSpec, cohort: Cohort, device: torch.device, on_progress: OnProgress) -> _Loaded | None:
    if spec.role not in _ROLE_NAMES:
        raise SpecError(f"engines: role {spec.role} is none that a worker can host")
    if spec.dtype not in DTYPES:
        raise SpecError(f"engines: dtype {spec.dtype!r} must be one of {', '.join(DTYPES)}")
    if not 1 <= spec.tp_size <= cohort.world_size:
        raise SpecError(f"engines: tp_size {spec.tp_size} must be 1 to the group's world_size {cohort.world_size}")
    check_lower(spec)
    is_asked_for = spec.HasField("batch_invariant")
    num_members, dtype = num_ranks(spec, cohort.world_size), DTYPES[spec.dtype]
    spec = choose_batch_invariance(spec, cohort, num_members=num_members, dtype=dtype, device=device)
    group = cohort.group(num_members, ordered_sum=spec.batch_invariant)
    if group is None:
        return None
    started_s = time.monotonic()
    model = _load_model(spec, group, cohort, device, on_progress)
    if spec.batch_invariant:
        on_progress("probing batch invariance", 0, 0)
        spec.batch_invariant = keeps_batch_invariance(
            model, group, is_asked_for=is_asked_for, dtype=dtype, device=device
        )
    kv_scales = _use_kv_dtype(spec, model, dtype, on_progress)
    layout = KVLayout(
        num_layers=model.num_kv_layers,
        block_size=spec.block_size,
        num_kv_heads=model.kv_heads_per_rank,
        head_dim=model.config.head_dim,
        dtype=torch.uint8 if kv_scales else dtype,
    )
    lower = load_lower(
        spec,
        group,
        dtype=dtype,
        device=device,
        progress=lambda done, total: on_progress("loading weights beneath the draft", done, total),
    )
    load_s = time.monotonic() - started_s
    return _Loaded(spec=spec, model=model, group=group, layout=layout, kv_scales=kv_scales, load_s=load_s, lower=lower)


def _use_kv_dtype(
    spec: EngineSpec, model: CausalLM | LayerParallelLM, dtype: torch.dtype, on_progress: OnProgress
) -> str:
    """A digest of the rank's scales if the cache is in FP8, else nothing. Raises SpecError and LoadError."""
    if spec.kv_dtype in ("", "auto"):
        return ""
    if spec.kv_dtype != "fp8" or not isinstance(model, CausalLM):
        raise SpecError(f"engines: kv_dtype {spec.kv_dtype!r} must be auto, or fp8 where layers are not parallel")
    on_progress("measuring keys and values", 0, 0)
    return use_fp8_caches(model, Path(spec.model), max_model_len=spec.max_model_len, dtype=dtype)


def _load_model(
    spec: EngineSpec, group: Group, cohort: Cohort, device: torch.device, on_progress: OnProgress
) -> CausalLM | LayerParallelLM:
    stage = f"loading {_ROLE_NAMES[spec.role]} weights"
    options: _LoadOptions = {
        "dtype": DTYPES[spec.dtype],
        "device": device,
        "group": group,
        "max_model_len": spec.max_model_len,
        "batch_invariant": spec.batch_invariant,
        "quantization": quantization_of(spec),
        "num_layers": spec.num_layers,
        "progress": lambda done, total: on_progress(stage, done, total),
    }
    if not is_layer_parallel(spec):
        return load_model(Path(spec.model), keeps_bits=spec.keeps_bits, **options)
    plan = resolve_plan(spec, group, cohort, device, on_progress)
    return load_layer_parallel_model(Path(spec.model), plan, **options)


def _own_num_blocks(loaded: Sequence[_Loaded], device: torch.device) -> dict[EngineRole.ValueType, int]:
    """How many blocks this rank has memory for, by role. Engines that share the free memory of a GPU get equally many,
    because a seq has as many tokens on the draft as on the target."""
    sharing = [entry for entry in loaded if entry.spec.kv_cache_bytes == 0]
    left = _bytes_left(sharing, device) if sharing else 0
    shared_blocks = left // sum(entry.block_bytes for entry in sharing) if sharing else 0
    return {
        entry.spec.role: entry.spec.kv_cache_bytes // entry.block_bytes if entry.spec.kv_cache_bytes else shared_blocks
        for entry in loaded
    }


def _bytes_left(sharing: Sequence[_Loaded], device: torch.device) -> int:
    """The memory that gpu_memory_utilization leaves after weights, activations, captured steps and buffers of moves."""
    if device.type != "cuda":
        raise SpecError("engines: kv_cache_bytes must be set on cpu (kv_cache.device_bytes in the deployment file)")
    activations = max(
        activation_bytes(
            entry.model,
            entry.layout,
            num_tokens=entry.spec.max_num_batched_tokens,
            max_model_len=entry.spec.max_model_len,
            device=device,
        )
        + reserved_sampling_bytes(entry.spec, vocab_size=entry.model.config.vocab_size, num_ranks=entry.group.size)
        for entry in sharing
    )
    free, total = torch.cuda.mem_get_info(device)
    utilization = min(entry.spec.gpu_memory_utilization for entry in sharing)
    staging = sum(staging_bytes(entry.spec, entry.layout) for entry in sharing)
    captured = sum(_captured_bytes(entry) for entry in sharing)
    return max(0, int(total * utilization) - (total - free) - activations - staging - captured)


def _captured_bytes(entry: _Loaded) -> int:
    value_bytes = DTYPES[entry.spec.dtype].itemsize
    return reserved_captured_bytes(entry.spec, entry.model.config, num_ranks=entry.group.size, value_bytes=value_bytes)


def reserved_sampling_bytes(spec: EngineSpec, *, vocab_size: int, num_ranks: int) -> int:
    """Memory for choosing tokens on one rank."""
    num_rows = num_sampled_rows(
        verifies=spec.role == EngineRole.ENGINE_ROLE_TARGET,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
    )
    return sampling_bytes(vocab_size=vocab_size, num_ranks=num_ranks, num_rows=num_rows)


def _build(
    entry: _Loaded,
    sizes: _Sizes,
    store: SegmentStore | None,
    device: torch.device,
    tracer: Tracer,
    agree: Agree,
    on_progress: OnProgress,
) -> Engine:
    spec, model, layout, num_blocks = entry.spec, entry.model, entry.layout, sizes.num_blocks
    budgeted = is_budgeted(spec)
    check_num_blocks(num_blocks, layout, num_tokens=num_tokens_on_device(spec), device=device)
    vocab_size = model.config.vocab_size
    limits = Limits(
        num_slots=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        vocab_size=vocab_size,
        block_size=spec.block_size,
        num_blocks=num_blocks,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        num_host_slots=sizes.num_host_slots if budgeted else 0,
    )
    kv_caches = layout.allocate(num_blocks, device)
    addresses = cache_addresses(kv_caches)
    role = _ROLE_NAMES[spec.role]
    sampler = Sampler(entry.group, vocab_size)
    on_captured = partial(on_progress, f"capturing steps of the {role}")
    captured = agree(capture_steps(spec, model, kv_caches, sampler, device=device, on_captured=on_captured))
    runner = ModelRunner(
        model=model,
        kv_caches=kv_caches,
        kv_addresses=addresses,
        sampler=sampler,
        captured=captured,
        num_ranks=entry.group.size,
        device=device,
        is_approximate=isinstance(model, LayerParallelLM) and model.plan.is_approximate,
        tracer=tracer,
    )
    info = describe_engine(
        spec,
        model,
        layout,
        entry.lower,
        num_blocks=num_blocks,
        num_host_slots=sizes.num_host_slots,
        num_disk_blocks=sizes.num_disk_blocks,
        load_s=entry.load_s,
    )
    is_target = spec.role == EngineRole.ENGINE_ROLE_TARGET
    warm_up(runner, limits, verifies=is_target, on_step=partial(on_progress, f"compiling kernels of the {role}"))
    host = build_host(spec, layout, role=role, device=device, on_progress=on_progress)
    mover = build_mover(spec, layout, kv_caches, addresses, host, store, device=device) if host else None
    table = SeqTable(limits, GrammarCompiler(Path(spec.model), vocab_size))
    if mover is not None:
        warm_up_moves(mover, device)
    if is_target:
        host_attention = build_host_attention(spec, model, kv_caches, host, layout)
        forced = spec.forced_acceptance
        return TargetEngine(runner, table, info, mover=mover, host_attention=host_attention, forced_acceptance=forced)
    lower = build_lower(spec, entry.lower, runner, limits)
    return DraftEngine(runner, table, info, mover=mover, lower=lower)
