"""How many KV blocks host memory and disk hold for each engine, and about how fast they come back. Pure.

Every engine of a deployment gets as many slots as every other, since all hold blocks of the same prefixes. So the node
whose ranks need most bytes for a block decides.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from childproc.segment_shape import choose_shape, least_bytes
from childproc.tier_block import TierBlock
from cluster.deployment.settings import Role, Settings
from cluster.errors import PlanError
from cluster.planning.plan import Bundle, Inventory, size_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Bytes per second that estimates assume: before a start nothing can be measured."""

    host: float = 10e9  # of each rank, from host memory to its device
    disk: float = 1e9  # of each node, shared by its ranks


_ASSUMED = Bandwidths()
_EXAMPLE_TOKENS = 8192
_HOST, _DISK = attrgetter("host_bytes"), attrgetter("disk_bytes")
_InTier = Callable[[TierBlock], int]  # what a block takes in one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A prefix that comes back from a tier to every engine."""

    num_tokens: int
    host_bytes: dict[Role, int]  # of all ranks of an engine, in host memory
    disk_bytes: dict[Role, int]  # on disk
    host_s: float  # from host memory, all ranks at once
    disk_s: float  # from disk


@dataclass(frozen=True, slots=True, kw_only=True)
class _DiskShare:
    """Of one rank of an engine."""

    num_bytes: int
    num_blocks: int  # in whole segments


def with_tiers(bundles: Sequence[Bundle], settings: Settings) -> tuple[Bundle, ...]:
    """The bundles with their share of host memory and disk. Raises PlanError if these have no room."""
    num_host_slots = _host_slots(_block_bytes_at_most(bundles, settings, _HOST), settings)
    shares = _disk_shares(bundles, max(_block_bytes_at_most(bundles, settings, _DISK).values()), settings)
    num_disk_blocks = min((share.num_blocks for share in shares.values()), default=0)
    return tuple(
        replace(
            bundle,
            num_host_slots=num_host_slots,
            num_disk_blocks=num_disk_blocks,
            disk_bytes={role: shares[role].num_bytes for role in bundle.engines if role in shares},
            memory=replace(bundle.memory, host_bytes=num_host_slots * _block_bytes(bundle, settings, _HOST)),
        )
        for bundle in bundles
    )


def with_tiers_of(bundles: Sequence[Bundle], others: Sequence[Bundle]) -> tuple[Bundle, ...]:
    """The bundles of more replicas, with what those of a replica that runs (`others`) have of host memory and disk."""
    shares = {(other.group, other.rank): other for other in others}
    shared = []
    for bundle in bundles:
        like = shares[bundle.group, bundle.rank]
        shared.append(
            replace(
                bundle,
                num_host_slots=like.num_host_slots,
                num_disk_blocks=like.num_disk_blocks,
                disk_bytes=like.disk_bytes,
                memory=replace(bundle.memory, host_bytes=like.memory.host_bytes),
            )
        )
    return tuple(shared)


def check_disks(bundles: Sequence[Bundle], inventory: Inventory, settings: Settings) -> None:
    """Raises PlanError if the folder of the disk tier cannot be used on a node, or its file system is too small."""
    disk = settings.kv_cache.disk
    used = {bundle.node_id for bundle in bundles}
    for node in inventory.nodes:
        if disk is None or node.disk is None or node.node_id not in used:
            continue
        if node.disk.problem:
            raise PlanError(f"kv_cache.disk.path: on node {node.label}: {node.disk.problem}")
        if not disk.read_only and disk.bytes > node.disk.free_bytes:
            raise PlanError(
                f"kv_cache.disk.bytes: {size_text(disk.bytes)}, but the file system of {disk.path} has only "
                f"{size_text(node.disk.free_bytes)} for it on node {node.label}; lower it, or give another folder"
            )


def _host_slots(block_bytes: Counter[str], settings: Settings) -> int:
    num_bytes = settings.kv_cache.cpu_bytes
    address, most = block_bytes.most_common(1)[0]
    if 0 < num_bytes < most:
        raise PlanError(
            f"kv_cache.cpu_bytes: {num_bytes:,} bytes hold no block: "
            f"one block of every rank on {address} takes {most:,} bytes; raise it"
        )
    return num_bytes // most


def _disk_shares(bundles: Sequence[Bundle], most: int, settings: Settings) -> dict[Role, _DiskShare]:
    """`most`: bytes of one block of every rank on the fullest node."""
    disk = settings.kv_cache.disk
    if disk is None:
        return {}
    roles = {role for bundle in bundles for role in bundle.engines}
    num_blocks = disk.bytes // most
    least_blocks = max(_least_disk_blocks(role, settings) for role in roles)
    if num_blocks < least_blocks:
        raise PlanError(
            f"kv_cache.disk.bytes: {disk.bytes:,} bytes hold no two segments of blocks of every rank on a node; "
            f"give at least {least_blocks * most:,}"
        )
    return {role: _disk_share(role, num_blocks, settings) for role in roles}


def _least_disk_blocks(role: Role, settings: Settings) -> int:
    """As many as take the bytes of the least disk."""
    block_bytes = settings.model(role).block_in_tiers(settings.kv_cache).disk_bytes
    return -(-least_bytes(block_bytes, settings.model(role).num_kv_layers) // block_bytes)


def _disk_share(role: Role, num_blocks: int, settings: Settings) -> _DiskShare:
    """The bytes of so many blocks, and how many they hold in addition to their metadata."""
    block_bytes = settings.model(role).block_in_tiers(settings.kv_cache).disk_bytes
    num_bytes = num_blocks * block_bytes
    shape = choose_shape(block_bytes, settings.model(role).num_kv_layers, num_bytes)
    return _DiskShare(num_bytes=num_bytes, num_blocks=shape.capacity(num_bytes))


def price_hit(num_tokens: int, bundles: Sequence[Bundle], settings: Settings, bandwidths: Bandwidths) -> Hit:
    """What a hit of so many tokens takes, by these bandwidths alone."""
    num_blocks = num_tokens / settings.kv_cache.block_size
    most_host = max(_block_bytes(bundle, settings, _HOST) for bundle in bundles)
    most_disk = max(_block_bytes_by_node(bundles, settings, _DISK).values())
    return Hit(
        num_tokens=num_tokens,
        host_bytes=_engine_bytes(num_blocks, bundles, settings, _HOST),
        disk_bytes=_engine_bytes(num_blocks, bundles, settings, _DISK),
        host_s=num_blocks * most_host / bandwidths.host,
        disk_s=num_blocks * most_disk / bandwidths.disk,
    )


def _engine_bytes(
    num_blocks: float, bundles: Sequence[Bundle], settings: Settings, in_tier: _InTier
) -> dict[Role, int]:
    """Of all ranks of each engine."""
    engine_bytes: dict[Role, int] = {}
    for role in (role for bundle in bundles for role in bundle.engines):
        part = int(num_blocks * in_tier(settings.model(role).block_in_tiers(settings.kv_cache)))
        engine_bytes[role] = engine_bytes.get(role, 0) + part
    return engine_bytes


def tier_notes(bundles: Sequence[Bundle], settings: Settings, bandwidths: Bandwidths = _ASSUMED) -> Iterator[str]:
    """What the tiers hold, and about how fast a long prompt comes back from them. For people."""
    block_size, bundle = settings.kv_cache.block_size, bundles[0]
    replica = [each for each in bundles if each.replica == bundle.replica]  # a prefix comes back to one
    if num_held := bundle.num_host_slots * block_size:
        hit = price_hit(_long_prompt(num_held, settings), replica, settings, bandwidths)
        yield (
            f"host memory holds the KV of {num_held:,} tokens{_bits_text(settings, 'host')}; "
            f"{_hit_text(hit.num_tokens, hit.host_bytes, hit.host_s)} if each rank copies "
            f"{bandwidths.host / 1e9:g} GB/s (assumed, not measured)"
        )
    if num_held := bundle.num_disk_blocks * block_size:
        hit = price_hit(_long_prompt(num_held, settings), replica, settings, bandwidths)
        yield (
            f"the disk holds the KV of {num_held:,} tokens{_bits_text(settings, 'disk')} in "
            f"{_usable_disk_text(bundles, settings)}; {_hit_text(hit.num_tokens, hit.disk_bytes, hit.disk_s)} "
            f"if a node's disk reads {bandwidths.disk / 1e9:g} GB/s (assumed, not measured)"
        )


def _usable_disk_text(bundles: Sequence[Bundle], settings: Settings) -> str:
    """Segments are whole, and they hold more than blocks."""
    assert settings.kv_cache.disk is not None, "it holds blocks"
    most = max(_block_bytes_at_most(bundles, settings, _DISK).values())
    return f"{size_text(bundles[0].num_disk_blocks * most)} of its {size_text(settings.kv_cache.disk.bytes)}"


def _long_prompt(num_held: int, settings: Settings) -> int:
    """Tokens of an example."""
    return min(_EXAMPLE_TOKENS, settings.max_model_len, num_held)


def _bits_text(settings: Settings, tier: Literal["host", "disk"]) -> str:
    tier_dtype = settings.kv_cache.tier_dtype
    if tier_dtype == "same":
        return ""
    num_bits = 4 if (tier_dtype, tier) == ("int4", "disk") else 8
    return f" in {num_bits} bits (not exact: tier_dtype {tier_dtype})"


def _hit_text(num_tokens: int, engine_bytes: dict[Role, int], seconds: float) -> str:
    sizes = ", ".join(f"{role} {size_text(num_bytes)}" for role, num_bytes in engine_bytes.items())
    return f"{num_tokens:,} tokens ({sizes}) come back in about {_seconds_text(seconds)}"


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"


def _block_bytes(bundle: Bundle, settings: Settings, in_tier: _InTier) -> int:
    """Of one block of each engine of the rank."""
    return sum(in_tier(settings.model(role).block_in_tiers(settings.kv_cache)) for role in bundle.engines)


def _block_bytes_at_most(bundles: Sequence[Bundle], settings: Settings, in_tier: _InTier) -> Counter[str]:
    """On each node, if all replicas that may still come were there."""
    needed = _block_bytes_by_node(bundles, settings, in_tier)
    first = [bundle for bundle in bundles if bundle.replica == bundles[0].replica]
    one = _block_bytes_by_node(first, settings, in_tier)
    num_to_come = settings.max_replicas - settings.num_replicas
    return Counter({address: num_bytes + num_to_come * max(one.values()) for address, num_bytes in needed.items()})


def _block_bytes_by_node(bundles: Sequence[Bundle], settings: Settings, in_tier: _InTier) -> Counter[str]:
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed[bundle.address] += _block_bytes(bundle, settings, in_tier)
    return needed
