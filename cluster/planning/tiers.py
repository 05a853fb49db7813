"""How many KV blocks host memory and disk hold behind each engine. Pure.

Every engine of a deployment gets as many slots as every other, since all hold blocks of the same prefixes. So the node
whose ranks need most bytes for a block decides.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cluster.deployment.settings import Settings
from cluster.errors import PlanError
from cluster.planning.plan import Bundle


def with_tiers(bundles: Sequence[Bundle], settings: Settings) -> tuple[Bundle, ...]:
    """The bundles with their share of host memory and disk. Raises PlanError if there is no room for one block."""
    cache = settings.kv_cache
    block_bytes = _block_bytes_by_node(bundles, settings)
    num_host_slots = _blocks("kv_cache.cpu_bytes", cache.cpu_bytes, block_bytes) if cache.cpu_bytes else 0
    num_disk_blocks = _blocks("kv_cache.disk.bytes", cache.disk.bytes, block_bytes) if cache.disk is not None else 0
    return tuple(
        replace(
            bundle,
            num_host_slots=num_host_slots,
            num_disk_blocks=num_disk_blocks,
            memory=replace(bundle.memory, host_bytes=num_host_slots * _block_bytes(bundle, settings)),
        )
        for bundle in bundles
    )


def tier_notes(bundles: Sequence[Bundle], settings: Settings) -> list[str]:
    """What the tiers hold, for people."""
    notes = []
    block_size, bundle = settings.kv_cache.block_size, bundles[0]
    if bundle.num_host_slots:
        notes.append(f"host memory holds the KV of {bundle.num_host_slots * block_size:,} tokens")
    if bundle.num_disk_blocks:
        notes.append(f"the disk holds the KV of {bundle.num_disk_blocks * block_size:,} tokens")
    return notes


def _block_bytes(bundle: Bundle, settings: Settings) -> int:
    """Of one block of each engine of the rank."""
    per_token = sum(settings.model(role).kv_bytes_per_token for role in bundle.engines)
    return per_token * settings.kv_cache.block_size


def _block_bytes_by_node(bundles: Sequence[Bundle], settings: Settings) -> Counter[str]:
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed[bundle.address] += _block_bytes(bundle, settings)
    return needed


def _blocks(key: str, num_bytes: int, block_bytes: Counter[str]) -> int:
    address, most = block_bytes.most_common(1)[0]
    if num_bytes < most:
        raise PlanError(
            f"{key}: {num_bytes:,} bytes hold no block: one of each rank on {address} takes {most:,}; raise it"
        )
    return num_bytes // most
