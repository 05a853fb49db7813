"""The tiers of one rank: what is moved arrives bit by bit, and a disk that hangs or fails holds up nobody else."""

import queue
import resource
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from childproc.tier_block import tier_block
from echelon.pb.worker_pb2 import EngineInfo, MoveOrder, MoveResult
from kernels.kv.block_copy import cache_addresses
from tests.helpers.kv_caches import Caches, clone, flat, random_caches
from workers.engine.kv_cache import KVLayout
from workers.engine.rounds import ProtocolError
from workers.tiers.copier import CpuCopier, Mark, make_copier
from workers.tiers.files import Files
from workers.tiers.host_slots import HostSlots
from workers.tiers.mover import Mover, Store
from workers.tiers.orders import check_order
from workers.tiers.rounding import Rounding
from workers.tiers.segment_store import SegmentStore, Written

LAYOUT = KVLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
NUM_SLOTS = 4
PATIENCE_S = 20.0  # for what must come


def digest(number: int) -> bytes:
    return bytes([number]) * 16


def block_bytes(number: int) -> bytes:
    return bytes([number]) * LAYOUT.block_bytes


@dataclass
class StuckStore:
    """A disk on which calls for some digests hang until `released`, and calls for others fail."""

    stuck: frozenset[bytes] = frozenset()
    broken: frozenset[bytes] = frozenset()
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    entered: queue.Queue[bytes] = field(default_factory=queue.Queue)  # the calls that hang
    released: threading.Event = field(default_factory=threading.Event)
    is_closed: bool = False

    def digests(self) -> list[bytes]:
        return list(self.blocks)

    def write(self, digest: bytes, block: memoryview) -> Written:
        self._enter(digest)
        self.blocks[digest] = bytes(block)
        return Written([digest[::-1]])

    def read_many(self, digests: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        for digest, buffer in zip(digests, into, strict=True):
            self._enter(digest)
            if digest in self.blocks:
                buffer[:] = self.blocks[digest]
        return [digest in self.blocks for digest in digests]

    def take_read_trouble(self) -> tuple[str, int]:
        return "", 0

    def drop(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self.blocks.pop(digest, None)

    def close(self) -> None:
        self.is_closed = True

    def _enter(self, digest: bytes) -> None:
        if digest in self.broken:
            raise OSError(5, "Input/output error")
        if digest in self.stuck:
            self.entered.put(digest)
            self.released.wait(PATIENCE_S)


class CopierOfNothing:
    def mark(self) -> Mark:
        return None

    def store(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        """There are no blocks."""

    load = store


class Rank:
    """A mover with its caches. `answers` has the results in the order in which they come."""

    def __init__(self, store: Store | None) -> None:
        self.caches = random_caches(6)
        self.host = HostSlots.allocate(NUM_SLOTS, LAYOUT, torch.device("cpu"), lambda done, total: None)
        self.mover = Mover(CpuCopier(self.caches, cache_addresses(self.caches), self.host), self.host, store)
        self.answers: queue.Queue[MoveResult] = queue.Queue()
        self._last_id = 0

    def submit(self, kind: MoveOrder.Kind.ValueType, **fields: object) -> int:
        self._last_id += 1
        order = MoveOrder(move_id=self._last_id, incarnation=3, kind=kind, **fields)  # type: ignore[arg-type]
        self.mover.submit(order, self.answers.put)
        return self._last_id

    def run(self, kind: MoveOrder.Kind.ValueType, **fields: object) -> MoveResult:
        move_id = self.submit(kind, **fields)
        result = self.answers.get(timeout=PATIENCE_S)
        assert (result.move_id, result.incarnation) == (move_id, 3)
        return result

    def slot(self, number: int) -> bytes:
        buffer = bytearray(LAYOUT.block_bytes)
        self.host.copy_to(memoryview(buffer), number)
        return bytes(buffer)


@pytest.fixture
def store(tmp_path: Path) -> SegmentStore:
    return SegmentStore.open(
        tmp_path, block_bytes=LAYOUT.block_bytes, num_parts=LAYOUT.num_layers, max_bytes=1 << 20, layout={}
    )


@pytest.fixture
def rank(store: SegmentStore) -> Iterator[Rank]:
    made = Rank(store)
    yield made
    made.mover.close(PATIENCE_S)


@pytest.fixture
def stuck() -> Iterator[tuple[Rank, StuckStore]]:
    """Blocks 1 to 3 are on the disk; whoever reads or writes 1 hangs, whoever reads or writes 9 fails."""
    store = StuckStore(stuck=frozenset({digest(1)}), broken=frozenset({digest(9)}))
    store.blocks = {digest(number): block_bytes(number) for number in (1, 2, 3)}
    made = Rank(store)
    yield made, store
    store.released.set()
    made.mover.close(PATIENCE_S)


def blocks_of(caches: Caches, *numbers: int) -> list[torch.Tensor]:
    return [cache[list(numbers)] for cache in flat(caches)]


def test_blocks_come_back_from_host_and_disk_bit_for_bit(rank: Rank) -> None:
    before = clone(rank.caches)
    assert not rank.run(MoveOrder.STORE, block_ids=[5, 0], host_slots=[1, 3]).failed
    assert not rank.run(MoveOrder.WRITE, host_slots=[1, 3], digests=[digest(1), digest(2)]).failed
    rank.host.memory.fill_(torch.nan)
    assert not rank.run(MoveOrder.READ, host_slots=[0, 2], digests=[digest(2), digest(1)]).failed
    result = rank.run(MoveOrder.LOAD, block_ids=[3, 4], host_slots=[0, 2])
    assert (list(result.failed), result.error) == ([], "")
    assert result.run_ns > 0
    expected = blocks_of(before, 0, 1, 2, 0, 5, 5)
    assert all(torch.equal(*pair) for pair in zip(flat(rank.caches), expected, strict=True))


@pytest.mark.parametrize(("tier_dtype", "num_steps"), [("int8", 0.5), ("int4", 8.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_blocks_come_back_close_to_what_they_were(
    tmp_path: Path, tier_dtype: str, num_steps: float, dtype: torch.dtype
) -> None:
    """From host memory within half a step of 8 bits; with int4 from disk within 8.5. An element that is nothing but its
    group's least or greatest in 8 bits keeps its value up to the last bits of the dtype."""
    layout = KVLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=dtype)
    size = tier_block(tier_dtype, num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, value_bytes=dtype.itemsize)
    host = HostSlots.allocate(4, layout, torch.device("cpu"), lambda done, total: None, size)
    assert (host.block_bytes, host.disk_block_bytes) == (size.host_bytes, size.disk_bytes)
    caches = random_caches(6, dtype=dtype)
    before = clone(caches)
    store = SegmentStore.open(tmp_path, block_bytes=size.disk_bytes, num_parts=3, max_bytes=1 << 20, layout={})
    mover = Mover(
        make_copier(caches, cache_addresses(caches), host, torch.device("cpu"), Rounding(layout)), host, store
    )
    answers: queue.Queue[MoveResult] = queue.Queue()
    two = [digest(1), digest(2)]
    for fields in (
        {"kind": MoveOrder.STORE, "block_ids": [5, 0], "host_slots": [1, 3]},
        {"kind": MoveOrder.WRITE, "host_slots": [1, 3], "digests": two},
        {"kind": MoveOrder.LOAD, "block_ids": [2, 4], "host_slots": [1, 3]},  # blocks 5 and 0 from host memory
        {"kind": MoveOrder.READ, "host_slots": [2, 0], "digests": two},
        {"kind": MoveOrder.LOAD, "block_ids": [1, 3], "host_slots": [2, 0]},  # the same from disk
    ):
        mover.submit(MoveOrder(**fields), answers.put)  # type: ignore[arg-type]
        assert not answers.get(timeout=PATIENCE_S).failed
    mover.close(PATIENCE_S)
    for number, (cache, old) in enumerate(zip(flat(caches), flat(before), strict=True)):
        group_dim = -1 if number % 2 else -3
        for blocks, most_steps in (([2, 4], 0.5), ([1, 3], num_steps)):
            expected = old[[5, 0]].float()
            step = (expected.amax(group_dim, keepdim=True) - expected.amin(group_dim, keepdim=True)) / 255
            last_bits = expected.abs().amax() * torch.finfo(dtype).eps
            assert ((cache[blocks].float() - expected).abs() <= most_steps * step + last_bits).all()
        assert torch.equal(cache[[0, 5]], old[[0, 5]])


def test_lower_bits_that_the_disk_does_not_have_lean_to_neither_side() -> None:
    layout = KVLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    size = tier_block("int4", num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, value_bytes=4)
    host = HostSlots.allocate(1, layout, torch.device("cpu"), lambda done, total: None, size)
    host.fill(0, memoryview(bytes(size.disk_bytes)))
    lower = host.memory[0, size.disk_bytes :]
    assert torch.stack([lower & 15, lower >> 4]).float().mean() == 7.5


def test_more_blocks_than_one_read_holds_all_arrive(tmp_path: Path) -> None:
    """Of 2 MiB each: two are read at a time."""
    layout = KVLayout(num_layers=2, block_size=16, num_kv_heads=16, head_dim=512, dtype=torch.float32)
    host = HostSlots.allocate(7, layout, torch.device("cpu"), lambda done, total: None)
    size = layout.block_bytes
    store = SegmentStore.open(tmp_path, block_bytes=size, num_parts=2, max_bytes=128 << 20, layout={})
    mover = Mover(CopierOfNothing(), host, store)
    answers: queue.Queue[MoveResult] = queue.Queue()
    fields = {"host_slots": range(7), "digests": [digest(number) for number in range(7)]}
    host.memory.copy_(torch.arange(7).view(7, 1, 1, 1, 1, 1))
    for kind in (MoveOrder.WRITE, MoveOrder.READ):
        mover.submit(MoveOrder(kind=kind, **fields), answers.put)  # type: ignore[arg-type]
        result = answers.get(timeout=PATIENCE_S)
        assert (list(result.failed), result.error) == ([], "")
        assert host.memory[:, 1, 1, 15, 15, 511].tolist() == list(range(7))
        host.memory.fill_(torch.nan)
    mover.close(PATIENCE_S)


def test_a_missing_block_fails_without_an_error(rank: Rank) -> None:
    rank.run(MoveOrder.STORE, block_ids=[5], host_slots=[1])
    rank.run(MoveOrder.WRITE, host_slots=[1], digests=[digest(1)])
    result = rank.run(MoveOrder.READ, host_slots=[0, 2], digests=[digest(7), digest(1)])
    assert (list(result.failed), result.error) == ([0], "")
    assert rank.slot(2) == rank.slot(1)


def test_a_damaged_block_is_counted_apart_from_missing_ones(rank: Rank, tmp_path: Path) -> None:
    rank.run(MoveOrder.STORE, block_ids=[5], host_slots=[1])
    rank.run(MoveOrder.WRITE, host_slots=[1], digests=[digest(1)])
    (segment,) = tmp_path.glob("*.tmp")
    whole = segment.read_bytes()
    assert rank.slot(1) in whole
    segment.write_bytes(whole.replace(rank.slot(1), bytes(LAYOUT.block_bytes)))
    result = rank.run(MoveOrder.READ, host_slots=[0, 2], digests=[digest(7), digest(1)])
    assert (list(result.failed), result.error, result.num_damaged) == ([0, 1], "", 1)


def test_dropped_blocks_are_gone(rank: Rank) -> None:
    rank.run(MoveOrder.WRITE, host_slots=[0, 1], digests=[digest(1), digest(2)])
    assert not rank.run(MoveOrder.DROP, digests=[digest(1)]).failed
    listed: queue.Queue[list[bytes]] = queue.Queue()
    rank.mover.list_disk(listed.put)
    assert listed.get(timeout=PATIENCE_S) == [digest(2)]
    assert list(rank.run(MoveOrder.READ, host_slots=[2, 3], digests=[digest(1), digest(2)]).failed) == [0]


def test_a_block_that_fails_is_reported_with_the_error(stuck: tuple[Rank, StuckStore]) -> None:
    rank, store = stuck
    result = rank.run(MoveOrder.READ, host_slots=[0], digests=[digest(9)])
    assert list(result.failed) == [0]
    assert "Input/output error" in result.error
    rank.run(MoveOrder.READ, host_slots=[1], digests=[digest(2)])
    result = rank.run(MoveOrder.WRITE, host_slots=[1, 1], digests=[digest(4), digest(9)])
    assert list(result.failed) == [1]
    assert list(result.evicted) == [digest(4)]
    assert store.blocks[digest(4)] == block_bytes(2)


class BrokenFiles(Files):
    """A disk from which nothing can be read while it `is_broken`."""

    is_broken = False

    def preadv(self, fd: int, into: memoryview, offset: int) -> int:
        if self.is_broken:
            raise OSError(5, "Input/output error")
        return super().preadv(fd, into, offset)


def test_an_unreadable_disk_is_distinguished_from_a_missing_block(tmp_path: Path) -> None:
    """Each error is told once."""
    files = BrokenFiles()
    options = {"block_bytes": LAYOUT.block_bytes, "num_parts": LAYOUT.num_layers, "max_bytes": 1 << 20}
    rank = Rank(SegmentStore.open(tmp_path, **options, layout={}, files=files))  # type: ignore[arg-type]
    rank.run(MoveOrder.WRITE, host_slots=[0], digests=[digest(1)])
    files.is_broken = True
    result = rank.run(MoveOrder.READ, host_slots=[1, 2], digests=[digest(7), digest(1)])
    assert list(result.failed) == [0, 1]
    assert "Input/output error" in result.error
    result = rank.run(MoveOrder.READ, host_slots=[1], digests=[digest(7)])
    assert (list(result.failed), result.error) == ([0], "")
    rank.mover.close(PATIENCE_S)


def test_a_hanging_read_delays_nobody_else(stuck: tuple[Rank, StuckStore]) -> None:
    rank, store = stuck
    hanging = rank.submit(MoveOrder.READ, host_slots=[0, 1], digests=[digest(1), digest(2)])
    assert store.entered.get(timeout=PATIENCE_S) == digest(1)
    assert not rank.run(MoveOrder.READ, host_slots=[2], digests=[digest(3)]).failed
    assert not rank.run(MoveOrder.WRITE, host_slots=[2], digests=[digest(4)]).failed
    assert not rank.run(MoveOrder.STORE, block_ids=[5], host_slots=[3]).failed
    assert not rank.run(MoveOrder.DROP, digests=[digest(3)]).failed
    store.released.set()
    assert rank.answers.get(timeout=PATIENCE_S).move_id == hanging
    assert rank.slot(0) == block_bytes(1)


def test_a_read_that_ends_after_a_reset_touches_no_slot(stuck: tuple[Rank, StuckStore]) -> None:
    rank, store = stuck
    rank.submit(MoveOrder.READ, host_slots=[0], digests=[digest(1)])
    store.entered.get(timeout=PATIENCE_S)
    rank.mover.reset()
    assert not rank.run(MoveOrder.READ, host_slots=[0], digests=[digest(2)]).failed
    store.released.set()
    rank.mover.close(PATIENCE_S)  # the late read has ended
    assert rank.slot(0) == block_bytes(2)


def test_a_write_that_ends_after_a_reset_writes_what_the_slot_held(stuck: tuple[Rank, StuckStore]) -> None:
    """And a write that had not begun writes nothing: the slot may hold anything by then."""
    rank, store = stuck
    del store.blocks[digest(1)]
    rank.run(MoveOrder.READ, host_slots=[0], digests=[digest(2)])
    for _ in range(2):  # as many as there are writers
        rank.submit(MoveOrder.WRITE, host_slots=[0], digests=[digest(1)])
        store.entered.get(timeout=PATIENCE_S)
    rank.submit(MoveOrder.WRITE, host_slots=[0], digests=[digest(5)])
    rank.mover.reset()
    rank.run(MoveOrder.READ, host_slots=[0], digests=[digest(3)])
    store.released.set()
    rank.mover.close(PATIENCE_S)
    assert store.blocks[digest(1)] == block_bytes(2)
    assert digest(5) not in store.blocks


class SlowCopier(CopierOfNothing):
    """Each copy waits for leave."""

    def __init__(self) -> None:
        self.record: list[str] = []
        self.begun, self.leave = threading.Event(), threading.Event()

    def store(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        self.begun.set()
        self.leave.wait(PATIENCE_S)
        self.record.append(f"stored {list(block_ids)}")


def test_a_reset_waits_for_the_copy_under_way_and_drops_later_ones() -> None:
    copier = SlowCopier()
    host = HostSlots.allocate(NUM_SLOTS, LAYOUT, torch.device("cpu"), lambda done, total: None)
    mover = Mover(copier, host, None)
    for block in (1, 2):
        mover.submit(MoveOrder(kind=MoveOrder.STORE, block_ids=[block], host_slots=[0]), lambda result: None)
    assert copier.begun.wait(PATIENCE_S)

    def reset() -> None:
        mover.reset()
        copier.record.append("reset")

    resetting = threading.Thread(target=reset)
    resetting.start()
    resetting.join(0.1)
    assert resetting.is_alive()
    copier.leave.set()
    resetting.join(PATIENCE_S)
    assert copier.record == ["stored [1]", "reset"]
    mover.close(PATIENCE_S)


def test_closing_does_not_wait_for_what_hangs(stuck: tuple[Rank, StuckStore]) -> None:
    rank, store = stuck
    rank.submit(MoveOrder.READ, host_slots=[0], digests=[digest(1)])
    store.entered.get(timeout=PATIENCE_S)
    rank.mover.close(patience_s=0.1)
    assert not store.released.is_set()


def test_closing_keeps_what_was_written(rank: Rank, tmp_path: Path) -> None:
    rank.run(MoveOrder.WRITE, host_slots=[0], digests=[digest(1)])
    rank.mover.close(PATIENCE_S)
    options = {"block_bytes": LAYOUT.block_bytes, "num_parts": LAYOUT.num_layers, "max_bytes": 1 << 20}
    again = SegmentStore.open(tmp_path, **options, layout={})  # type: ignore[arg-type]
    assert again.digests() == [digest(1)]
    again.close()


def test_host_memory_is_allocated_at_once() -> None:
    """As much of it as was asked for, and not when the first blocks come."""
    layout = KVLayout(num_layers=4, block_size=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    told: list[tuple[int, int]] = []
    before = resident_bytes()
    host = HostSlots.allocate(1200, layout, torch.device("cpu"), lambda done, total: told.append((done, total)))
    wanted = 1200 * layout.block_bytes
    assert wanted * 0.95 < resident_bytes() - before < wanted * 1.1
    assert host.block_bytes == layout.block_bytes
    assert len(told) > 1
    assert told[-1] == (wanted, wanted)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


INFO = EngineInfo(num_blocks=64, num_host_slots=8, num_disk_blocks=100)
D = [digest(1), digest(2)]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (0, {}, "kind: 0 is none"),
        (MoveOrder.STORE, {}, "block_ids: is empty"),
        (MoveOrder.STORE, {"block_ids": [1, 2], "host_slots": [1]}, "host_slots: has 1 entries, must have 2"),
        (MoveOrder.LOAD, {"block_ids": [1, 64], "host_slots": [1, 2]}, "block_ids: block 64, must be below 64"),
        (MoveOrder.LOAD, {"block_ids": [1, 2], "host_slots": [1, 8]}, "host_slots: slot 8, must be below 8"),
        (MoveOrder.LOAD, {"block_ids": [1, 1], "host_slots": [1, 2]}, "block_ids: block named twice"),
        (MoveOrder.STORE, {"block_ids": [1, 2], "host_slots": [3, 3]}, "host_slots: slot named twice"),
        (MoveOrder.STORE, {"block_ids": [1], "host_slots": [3], "digests": D}, "digests: has 2 entries, must have 0"),
        (MoveOrder.WRITE, {"host_slots": [1], "digests": D}, "digests: has 2 entries, must have 1"),
        (MoveOrder.READ, {"host_slots": [1], "digests": [b"short"]}, "digests: one of 5 bytes, must have 16"),
        (MoveOrder.READ, {"host_slots": [1, 2], "digests": D[:1] * 2}, "digests: one is named twice"),
        (MoveOrder.DROP, {"digests": D, "host_slots": [1, 2]}, "host_slots: has 2 entries, must have 0"),
    ],
)
def test_an_impossible_order_is_refused_and_names_the_field(
    kind: MoveOrder.Kind.ValueType, fields: dict[str, object], message: str
) -> None:
    order = MoveOrder(move_id=7, kind=kind, **fields)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError) as error:
        check_order(order, INFO)
    assert str(error.value) == f"move 7: {message}"


def test_an_order_to_a_missing_tier_is_refused() -> None:
    load = MoveOrder(move_id=7, kind=MoveOrder.LOAD, block_ids=[1], host_slots=[1])
    read = MoveOrder(move_id=7, kind=MoveOrder.READ, digests=D[:1], host_slots=[1])
    for order in (load, read):
        check_order(order, INFO)
    with pytest.raises(ProtocolError, match="move 7: kind: LOAD, but the engine has no host tier"):
        check_order(load, EngineInfo(num_blocks=64))
    with pytest.raises(ProtocolError, match="move 7: kind: READ, but the engine has no disk tier"):
        check_order(read, EngineInfo(num_blocks=64, num_host_slots=8))
