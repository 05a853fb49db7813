"""Sets up the tiers below a device's KV cache for an engine: host memory, and a folder on disk."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import xxhash

from checkpoint.tensors import weight_files
from childproc.disk_folder import folder_problem
from childproc.segment_shape import TooFewBytesError
from childproc.spec import SpecError
from childproc.tier_block import LEAST_BUDGETED_BLOCKS, TierBlock, tier_block
from echelon import __version__
from echelon.pb.process_pb2 import EngineSpec
from echelon.pb.worker_pb2 import EngineRole
from kernels.kv.block_copy import CacheAddresses
from kernels.native.library import library_name
from kernels.native.linear import why_not
from workers.engine.host_attention import HostAttention, scratch_bytes
from workers.engine.kv_cache import KVCaches, KVLayout
from workers.models.decoder import CausalLM
from workers.models.layer_groups import LayerParallelPlan
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.process.cohort import Cohort
from workers.tiers.copier import STAGING_BYTES, make_copier
from workers.tiers.files import Files
from workers.tiers.folder import StoreError
from workers.tiers.host_slots import HostSlots
from workers.tiers.layout import layout_digest
from workers.tiers.mover import Mover
from workers.tiers.old_layouts import OldLayouts, RoomyFiles
from workers.tiers.rounding import Rounding
from workers.tiers.segment_store import SegmentStore

_READ_BYTES = 16 << 20  # of a weight file at a time, to digest it; not measured

OnProgress = Callable[[str, int, int], None]  # stage, done, total
Facts = dict[str, str | int | bool]


def has_disk(spec: EngineSpec) -> bool:
    return spec.tiers.num_host_slots > 0 and bool(spec.tiers.disk_path)


def rounds_blocks(spec: EngineSpec) -> bool:
    """Whether the tiers hold less than the device does."""
    return tier_dtype(spec) != "same"


def tier_dtype(spec: EngineSpec) -> str:
    return spec.tiers.tier_dtype or "same"


def is_budgeted(spec: EngineSpec) -> bool:
    """Whether a seq may have more blocks than the device. Raises SpecError."""
    if spec.attention in ("", "full"):
        return False
    if spec.attention != "budgeted" or not spec.tiers.num_host_slots or rounds_blocks(spec):
        raise SpecError(
            f"engines: attention {spec.attention!r} must be full, or budgeted where host memory holds exact blocks"
        )
    return True


def num_tokens_on_device(spec: EngineSpec) -> int:
    """Of one seq, for which a device must have room."""
    least = LEAST_BUDGETED_BLOCKS * spec.block_size
    return min(spec.max_model_len, least) if is_budgeted(spec) else spec.max_model_len


def block_in_tiers(spec: EngineSpec, layout: KVLayout) -> TierBlock:
    """Bytes of one block on one rank."""
    return tier_block(
        tier_dtype(spec),
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        value_bytes=layout.dtype.itemsize,
    )


def staging_bytes(spec: EngineSpec, layout: KVLayout) -> int:
    """Device memory for what moves between a GPU and the host, and for attention to what has moved."""
    row_bytes = block_in_tiers(spec, layout).host_bytes
    num_rows = min(spec.tiers.num_host_slots, 1 + STAGING_BYTES // row_bytes)
    # A rounded block is there three times: as it was, in parts, and packed.
    moves = num_rows * (layout.block_bytes + 2 * row_bytes if rounds_blocks(spec) else row_bytes)
    return moves + (scratch_bytes(layout, max_model_len=spec.max_model_len) if _reads_host(spec) else 0)


def build_host_attention(
    spec: EngineSpec,
    model: CausalLM | LayerParallelLM,
    kv_caches: KVCaches,
    host: HostSlots | None,
    layout: KVLayout,
) -> HostAttention | None:
    """None if no seq of the engine has blocks in host memory. Raises SpecError."""
    if host is None or not _reads_host(spec) or not isinstance(model, CausalLM):
        return None
    return HostAttention(model, kv_caches, host.memory, layout, max_model_len=spec.max_model_len)


def _reads_host(spec: EngineSpec) -> bool:
    return is_budgeted(spec) and spec.role == EngineRole.ENGINE_ROLE_TARGET


def open_store(
    spec: EngineSpec, layout: KVLayout, facts: Facts, *, role: str, rank: int, num_ranks: int
) -> SegmentStore:
    """The disk tier of this rank. Blocks of engines whose facts differ never meet, because each digest of the facts has
    a folder of its own. Raises StoreError, which names the key of the deployment file."""
    disk, own = Path(spec.tiers.disk_path), layout_digest(facts)
    replica = f"-replica{spec.tiers.replica}" if spec.tiers.replica else ""
    folder = disk / own / f"{role}-rank{rank}of{num_ranks}{replica}"
    old_layouts = OldLayouts(Files(), disk, own=own, max_bytes=spec.tiers.disk_node_bytes)
    if problem := folder_problem(disk, read_only=spec.tiers.disk_read_only):
        raise StoreError(f"kv_cache.disk.path: {problem}")
    try:
        with contextlib.nullcontext() if spec.tiers.disk_read_only else old_layouts.while_opening():
            return SegmentStore.open(
                folder,
                block_bytes=block_in_tiers(spec, layout).disk_bytes,
                num_parts=layout.num_layers,
                max_bytes=spec.tiers.disk_bytes,
                layout={**facts, "rank": rank},
                read_only=spec.tiers.disk_read_only,
                files=RoomyFiles(old_layouts),
            )
    except TooFewBytesError as err:
        raise StoreError(f"kv_cache.disk.bytes: {err}; raise it") from None
    except StoreError as err:
        raise StoreError(f"kv_cache.disk.path: {err}") from None
    except OSError as err:
        raise StoreError(f"kv_cache.disk.path: {folder} cannot be used ({err}); give another folder") from err


def build_host(
    spec: EngineSpec, layout: KVLayout, *, role: str, device: torch.device, on_progress: OnProgress
) -> HostSlots | None:
    """Takes the host memory. None if the engine has no host tier. Raises KVCacheError."""
    num_slots = spec.tiers.num_host_slots
    if not num_slots:
        return None
    stage = f"taking host memory for KV of the {role}"
    rounded = block_in_tiers(spec, layout) if rounds_blocks(spec) else None
    return HostSlots.allocate(num_slots, layout, device, lambda done, total: on_progress(stage, done, total), rounded)


def build_mover(
    spec: EngineSpec,
    layout: KVLayout,
    kv_caches: KVCaches,
    addresses: CacheAddresses,
    host: HostSlots,
    store: SegmentStore | None,
    *,
    device: torch.device,
) -> Mover:
    rounding = Rounding(layout) if rounds_blocks(spec) else None
    return Mover(make_copier(kv_caches, addresses, host, device, rounding), host, store)


def kv_facts(
    spec: EngineSpec, plan: LayerParallelPlan | None, *, num_ranks: int, weights: str, device: torch.device
) -> Facts:
    """Everything that decides the bits of a block, the same on all ranks of an engine. `weights`: their fingerprint."""
    facts: Facts = {
        "echelon": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "role": spec.role,
        "weights": weights,
        "dtype": spec.dtype,
        "tier_dtype": tier_dtype(spec),
        "block_size": spec.block_size,
        "num_ranks": num_ranks,
        "tp_size": spec.tp_size,
        "batch_invariant": spec.batch_invariant,
        "quantization": spec.quantization,
        "keeps_bits": spec.keeps_bits,
        "num_layers": spec.num_layers,
    }
    if plan is not None:
        groups = " ".join(",".join(map(str, group)) for group in plan.groups)
        facts |= {"layer_groups": groups, "layer_parallel_weights": plan.weights, "layer_parallel_mlp": plan.mlps}
    return facts | _machine(device)


def _machine(device: torch.device) -> Facts:
    """What computes: other instructions, kernels or numbers of threads round otherwise."""
    if device.type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return {"device": torch.cuda.get_device_name(device), "capability": capability}
    return {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "kernels": "torch" if why_not() else library_name(),
        "threads": torch.get_num_threads(),
    }


def weights_fingerprint(spec: EngineSpec, cohort: Cohort, key: str, *, num_ranks: int) -> str:
    """A digest of the contents of the engine's model folder, whatever its path. All ranks of the cohort call it; the
    first `num_ranks`, which run the engine, read a share of the files each."""
    share = ""
    if cohort.rank < num_ranks:
        folder = Path(spec.model)
        files = [folder / "config.json", *weight_files(folder)][cohort.rank :: num_ranks]
        share = " ".join(f"{file.name} {_file_digest(file)}" for file in files)
    return xxhash.xxh3_128_hexdigest("\n".join(cohort.gather(key, share)).encode())


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(memoryview(buffer)[:num_bytes])
    return digest.hexdigest()
