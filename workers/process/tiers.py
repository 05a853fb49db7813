"""Sets up the tiers below a device's KV cache for an engine: host memory, and a folder on disk."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import xxhash

from checkpoint.tensors import weight_files
from echelon import __version__
from echelon.pb.process_pb2 import EngineSpec
from kernels.kv.block_copy import CacheAddresses
from kernels.native.linear import why_not
from workers.engine.kv_cache import KVCaches, KVLayout
from workers.models import LayerParallelPlan
from workers.process.cohort import Cohort
from workers.tiers.copier import STAGING_BYTES, make_copier
from workers.tiers.files import Files
from workers.tiers.folder import StoreError
from workers.tiers.host_slots import HostSlots
from workers.tiers.layout import layout_digest
from workers.tiers.mover import Mover
from workers.tiers.old_layouts import OldLayouts, RoomyFiles
from workers.tiers.segment_store import SegmentStore

_READ_BYTES = 16 << 20

OnProgress = Callable[[str, int, int], None]  # stage, done, total
Facts = dict[str, str | int | bool]


def has_disk(spec: EngineSpec) -> bool:
    return spec.tiers.num_host_slots > 0 and bool(spec.tiers.disk_path)


def staging_bytes(spec: EngineSpec, layout: KVLayout) -> int:
    """Device memory that moves between a GPU and the host take."""
    return min(STAGING_BYTES + layout.block_bytes, spec.tiers.num_host_slots * layout.block_bytes)


def open_store(
    spec: EngineSpec, layout: KVLayout, facts: Facts, *, role: str, rank: int, num_ranks: int
) -> SegmentStore:
    """The disk tier of this rank. Blocks of engines whose facts differ never meet, because each digest of the facts has
    a folder of its own. Raises StoreError, which names the section of the deployment file."""
    disk, own = Path(spec.tiers.disk_path), layout_digest(facts)
    folder = disk / own / f"{role}-rank{rank}of{num_ranks}"
    old_layouts = OldLayouts(Files(), disk, own=own, max_bytes=spec.tiers.disk_node_bytes)
    try:
        with contextlib.nullcontext() if spec.tiers.disk_read_only else old_layouts.while_opening():
            return SegmentStore.open(
                folder,
                block_bytes=layout.block_bytes,
                num_parts=layout.num_layers,
                max_bytes=spec.tiers.disk_bytes,
                layout={**facts, "rank": rank},
                read_only=spec.tiers.disk_read_only,
                files=RoomyFiles(old_layouts),
            )
    except StoreError as err:
        raise StoreError(f"kv_cache.disk: {err}") from None
    except OSError as err:
        raise StoreError(f"kv_cache.disk: {folder} cannot be used ({err}); give another folder") from err


def build_mover(
    spec: EngineSpec,
    layout: KVLayout,
    kv_caches: KVCaches,
    addresses: CacheAddresses,
    store: SegmentStore | None,
    *,
    role: str,
    device: torch.device,
    on_progress: OnProgress,
) -> Mover | None:
    """Takes the host memory. None if the engine has no host tier. Raises KVCacheError."""
    num_slots = spec.tiers.num_host_slots
    if not num_slots:
        return None
    stage = f"taking host memory for KV of the {role}"
    host = HostSlots.allocate(num_slots, layout, device, lambda done, total: on_progress(stage, done, total))
    return Mover(make_copier(kv_caches, addresses, host, device), host, store)


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
        "block_size": spec.block_size,
        "num_ranks": num_ranks,
        "tp_size": spec.tp_size,
        "batch_invariant": spec.batch_invariant,
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
        "kernels": "torch" if why_not() else "native",
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
