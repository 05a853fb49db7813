"""How many KV blocks host memory and disk hold behind each engine, and about how fast they come back. Pure.

Every engine of a deployment gets as many slots as every other, since all hold blocks of the same prefixes. So the node
whose ranks need most bytes for a block decides.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.deployment.settings import Role, Settings
from cluster.errors import PlanError
from cluster.planning.plan import Bundle, size_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """Bytes per second that estimates assume: before a start nothing can be measured."""

    host: float = 10e9  # of each rank, from host memory to its device
    disk: float = 1e9  # of each node, shared by its ranks


_ASSUMED = Bandwidths()
_EXAMPLE_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A prefix that comes back from a tier to every engine."""

    num_tokens: int
    engine_bytes: dict[Role, int]  # of all ranks of an engine
    host_s: float  # from host memory, all ranks at once
    disk_s: float  # from disk


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


def price_hit(num_tokens: int, bundles: Sequence[Bundle], settings: Settings, bandwidths: Bandwidths) -> Hit:
    """What a hit of so many tokens takes, by these bandwidths alone."""
    engine_bytes: dict[Role, int] = {}
    node_bytes: Counter[str] = Counter()
    for bundle in bundles:
        node_bytes[bundle.address] += num_tokens * _token_bytes(bundle, settings)
        for role in bundle.engines:
            part = num_tokens * settings.model(role).kv_bytes_per_token
            engine_bytes[role] = engine_bytes.get(role, 0) + part
    return Hit(
        num_tokens=num_tokens,
        engine_bytes=engine_bytes,
        host_s=num_tokens * max(_token_bytes(bundle, settings) for bundle in bundles) / bandwidths.host,
        disk_s=max(node_bytes.values()) / bandwidths.disk,
    )


def tier_notes(bundles: Sequence[Bundle], settings: Settings, bandwidths: Bandwidths = _ASSUMED) -> Iterator[str]:
    """What the tiers hold, and about how fast a long prompt comes back from them. For people."""
    block_size, bundle = settings.kv_cache.block_size, bundles[0]
    if num_held := bundle.num_host_slots * block_size:
        hit = price_hit(_long_prompt(num_held, settings), bundles, settings, bandwidths)
        yield (
            f"host memory holds the KV of {num_held:,} tokens; {_hit_text(hit, hit.host_s)} if each rank copies "
            f"{bandwidths.host / 1e9:g} GB/s (assumed, not measured)"
        )
    if num_held := bundle.num_disk_blocks * block_size:
        hit = price_hit(_long_prompt(num_held, settings), bundles, settings, bandwidths)
        yield (
            f"the disk holds the KV of {num_held:,} tokens; {_hit_text(hit, hit.disk_s)} if a node's disk reads "
            f"{bandwidths.disk / 1e9:g} GB/s (assumed, not measured)"
        )


def _long_prompt(num_held: int, settings: Settings) -> int:
    """Tokens of an example."""
    return min(_EXAMPLE_TOKENS, settings.max_model_len, num_held)


def _hit_text(hit: Hit, seconds: float) -> str:
    return f"{hit.num_tokens:,} tokens ({_engine_sizes(hit)}) come back in about {_seconds_text(seconds)}"


def _engine_sizes(hit: Hit) -> str:
    return ", ".join(f"{role} {size_text(num_bytes)}" for role, num_bytes in hit.engine_bytes.items())


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"


def _block_bytes(bundle: Bundle, settings: Settings) -> int:
    """Of one block of each engine of the rank."""
    return _token_bytes(bundle, settings) * settings.kv_cache.block_size


def _token_bytes(bundle: Bundle, settings: Settings) -> int:
    return sum(settings.model(role).kv_bytes_per_token for role in bundle.engines)


def _block_bytes_by_node(bundles: Sequence[Bundle], settings: Settings) -> Counter[str]:
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed[bundle.address] += _block_bytes(bundle, settings)
    return needed


def _blocks(key: str, num_bytes: int, block_bytes: Counter[str]) -> int:
    address, most = block_bytes.most_common(1)[0]
    if num_bytes < most:
        raise PlanError(
            f"{key}: {num_bytes:,} bytes hold no block: "
            f"one block of every rank on {address} takes {most:,} bytes; raise it"
        )
    return num_bytes // most
