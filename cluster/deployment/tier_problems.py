"""What is wrong with the keys of the tiers below the devices, with each other or with the target."""

from collections.abc import Iterator

from cluster.deployment.settings import Settings
from cluster.errors import Problem


def tier_problems(settings: Settings) -> Iterator[Problem]:
    cache = settings.kv_cache
    if cache.cpu_bytes and not settings.scheduler.enable_prefix_caching:
        message = "keeps prefixes, and scheduler.enable_prefix_caching is false"
        yield Problem(
            path="kv_cache.cpu_bytes", value=str(cache.cpu_bytes), message=message, remedy="leave one of them out"
        )
    yield from _rounding_problems(settings)
    yield from _attention_problems(settings)
    if cache.store != "on_complete" and not cache.cpu_bytes:
        message, remedy = "there is no host memory to store blocks in", "set kv_cache.cpu_bytes too, or leave it out"
        yield Problem(path="kv_cache.store", value=repr(cache.store), message=message, remedy=remedy)
    if cache.disk is not None and not cache.cpu_bytes:
        message = "blocks go to disk through host memory"
        yield Problem(path="kv_cache.disk", message=message, remedy="set kv_cache.cpu_bytes too")
    if cache.disk is not None and cache.disk.write == "all" and cache.disk.read_only:
        message, remedy = "nothing is written with kv_cache.disk.read_only", "leave one of them out"
        yield Problem(path="kv_cache.disk.write", value="'all'", message=message, remedy=remedy)


def _rounding_problems(settings: Settings) -> Iterator[Problem]:
    """Rounded tiers need tiers, and blocks that get smaller."""
    cache = settings.kv_cache
    if cache.tier_dtype == "same":
        return
    path, value = "kv_cache.tier_dtype", repr(cache.tier_dtype)
    if not cache.cpu_bytes:
        message, remedy = "there are no tiers below the devices", "set kv_cache.cpu_bytes too, or leave it out"
        yield Problem(path=path, value=value, message=message, remedy=remedy)
    if cache.dtype == "fp8":
        message, remedy = "the blocks of kv_cache.dtype fp8 have 8 bits already", "leave one of them out"
        yield Problem(path=path, value=value, message=message, remedy=remedy)
        return
    exact = settings.target.kv_bytes_per_token * cache.block_size
    rounded = settings.target.block_in_tiers(cache).host_bytes
    if rounded >= exact:
        message = f"a block takes {rounded} bytes with its scales, and {exact} as it is"
        yield Problem(path=path, value=value, message=message, remedy="raise kv_cache.block_size, or leave it out")


def _attention_problems(settings: Settings) -> Iterator[Problem]:
    """Attention that reads host memory needs it, with blocks as they are on the devices, as soon as they are full."""
    cache = settings.kv_cache
    if settings.attention != "budgeted":
        return
    remedies = {
        "set kv_cache.cpu_bytes too": not cache.cpu_bytes,
        "leave kv_cache.tier_dtype out": cache.tier_dtype != "same",
        "leave kv_cache.store out": cache.store != "on_complete",
    }
    for remedy in (remedy for remedy, is_needed in remedies.items() if is_needed):
        message = "keeps exact copies of all full blocks in host memory"
        yield Problem(path="attention", value="'budgeted'", message=message, remedy=remedy)
