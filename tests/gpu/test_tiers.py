"""Copies between a GPU and host memory: right bits, in order with the work of other streams. Needs no Ray."""

from itertools import chain

import pytest
import torch

from childproc.tier_block import tier_block
from kernels.kv.block_copy import cache_addresses
from tests.helpers.kv_caches import Caches, clone, flat, random_caches
from workers.engine.kv_cache import KVLayout
from workers.tiers import copier
from workers.tiers.copier import CudaCopier, make_copier
from workers.tiers.host_slots import HostSlots
from workers.tiers.rounding import Rounding

pytestmark = pytest.mark.gpu

LAYOUT = KVLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)
NUM_SLOTS = 9
BLOCKS, SLOTS = [5, 0, 3, 1, 7], [4, 5, 6, 0, 8]  # slots that follow each other, and others
SLEEP_CYCLES = 200_000_000  # some 0.1 s


@pytest.fixture
def caches() -> Caches:
    return random_caches(8, dtype=torch.bfloat16, device="cuda")


@pytest.fixture(params=[2, 64], ids=lambda blocks: f"staging{blocks}")
def parts(
    request: pytest.FixtureRequest, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> tuple[CudaCopier, HostSlots]:
    """With a staging buffer that is smaller than an order, and with one that is larger."""
    monkeypatch.setattr(copier, "STAGING_BYTES", request.param * LAYOUT.block_bytes)
    host = HostSlots.allocate(NUM_SLOTS, LAYOUT, torch.device("cuda"), lambda done, total: None)
    return CudaCopier(caches, cache_addresses(caches), host, rounding=None), host


def test_blocks_come_back_bit_for_bit(caches: Caches, parts: tuple[CudaCopier, HostSlots]) -> None:
    copies, host = parts
    assert host.memory.is_pinned()
    before = clone(caches)
    copies.store(BLOCKS, SLOTS, copies.mark())
    for number, cache in enumerate(flat(before)):
        assert torch.equal(host.memory[SLOTS, number // 2, number % 2], cache[BLOCKS].cpu())
    for cache in flat(caches):
        cache.zero_()
    copies.load(BLOCKS[::-1], SLOTS, copies.mark())
    for after, old in zip(flat(caches), flat(before), strict=True):
        assert torch.equal(after[BLOCKS[::-1]], old[BLOCKS])
        assert not after[[2, 4, 6]].any()


def test_a_store_waits_for_the_rounds_before_it(caches: Caches, parts: tuple[CudaCopier, HostSlots]) -> None:
    copies, host = parts
    torch.cuda._sleep(SLEEP_CYCLES)
    for cache in flat(caches):
        cache.fill_(7)
    copies.store(BLOCKS, SLOTS, copies.mark())
    assert (host.memory[SLOTS] == 7).all()


def test_rounds_after_a_load_see_it(caches: Caches, parts: tuple[CudaCopier, HostSlots]) -> None:
    """And the load has waited for those before it, which still read what it overwrites."""
    copies, host = parts
    host.memory.fill_(7)
    torch.cuda._sleep(SLEEP_CYCLES)
    before = [cache.clone() for cache in flat(caches)]
    expected = [cache.cpu() for cache in chain.from_iterable(random_caches(8, dtype=torch.bfloat16))]
    copies.load(BLOCKS, SLOTS, copies.mark())
    after = [cache[BLOCKS] for cache in flat(caches)]
    assert all(torch.equal(cache.cpu(), old) for cache, old in zip(before, expected, strict=True))
    assert all((cache == 7).all() for cache in after)


def test_rounded_blocks_are_the_bytes_that_a_cpu_makes_of_them(caches: Caches) -> None:
    """On the way out, and on the way back."""
    size = tier_block("int8", num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, value_bytes=2)
    on_cpu = [(k.cpu(), v.cpu()) for k, v in caches]
    rows = []
    for each, device in ((caches, torch.device("cuda")), (on_cpu, torch.device("cpu"))):
        host = HostSlots.allocate(NUM_SLOTS, LAYOUT, device, lambda done, total: None, size)
        copies = make_copier(each, cache_addresses(each), host, device, Rounding(LAYOUT))
        copies.store(BLOCKS, SLOTS, copies.mark())
        copies.load(BLOCKS[::-1], SLOTS, copies.mark())
        rows.append(host.memory[SLOTS])
    assert torch.equal(*rows)
    assert all(torch.equal(cache.cpu(), right) for cache, right in zip(flat(caches), flat(on_cpu), strict=True))
