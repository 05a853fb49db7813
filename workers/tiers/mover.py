"""Moves KV blocks of one engine between the tiers, on one rank.

Copies between device and host never hang: one thread does them, in order. Disks may hang or fail: readers and writers
are threads of their own, each with buffers of its own. A write copies the slot to a buffer first; a read checks what it
has read in a buffer before it copies it to the slot. So storage that hangs holds no slot.

A reset ends what was ordered before: what has not begun never begins, and a read that ends later touches no slot.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from childproc.segment_shape import page_aligned
from echelon.pb.worker_pb2 import MoveOrder, MoveResult
from workers.tiers.copier import Copier, Mark
from workers.tiers.files import aligned_buffer
from workers.tiers.host_slots import HostSlots

logger = logging.getLogger(__name__)

# None of these numbers is measured.
_NUM_READERS = 4  # a disk is fast only with several requests at a time
_NUM_WRITERS = 2  # the second continues while the first makes a segment
_READ_BYTES = 4 << 20  # at a time, or one block: blocks that lie side by side are read in one go

OnMoved = Callable[[MoveResult], None]
OnListed = Callable[[list[bytes]], None]


class Written(Protocol):
    @property
    def evicted(self) -> list[bytes]: ...


class Store(Protocol):
    """What a mover needs of a SegmentStore. Thread-safe. Calls may hang, and raise OSError or ValueError."""

    def digests(self) -> list[bytes]: ...

    def write(self, digest: bytes, block: memoryview) -> Written: ...

    def read_many(self, digests: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]: ...

    def take_read_trouble(self) -> tuple[str, int]: ...

    def drop(self, digests: Iterable[bytes]) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Move:
    """An order, and what has become of its blocks. Several threads may work on it."""

    order: MoveOrder
    num_left: int  # pieces of work; the last one reports
    generation: int
    on_moved: OnMoved
    result: MoveResult = field(default_factory=MoveResult)
    began_ns: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        with self.lock:
            self.began_ns = self.began_ns or time.monotonic_ns()

    def end(
        self, failed: Iterable[int] = (), error: str = "", *, evicted: Iterable[bytes] = (), num_damaged: int = 0
    ) -> None:
        with self.lock:
            self.result.num_damaged += num_damaged
            self.result.failed.extend(failed)
            self.result.error = self.result.error or error
            self.result.evicted.extend(evicted)
            self.num_left -= 1
            if self.num_left:
                return
        self.result.move_id, self.result.incarnation = self.order.move_id, self.order.incarnation
        self.result.run_ns = time.monotonic_ns() - self.began_ns
        self.on_moved(self.result)


class Mover:
    """`submit`, `list_disk` and `reset` are for the thread that runs rounds. What callbacks get comes from other
    threads. An order that was submitted before the last reset may be answered or not."""

    def __init__(self, copier: Copier, host: HostSlots, store: Store | None) -> None:
        self._copier = copier
        self._host = host
        self._store = store
        self._generation = 0  # resets so far
        self._slots_lock = threading.Lock()  # an I/O thread copies to or from a slot, or a new generation begins
        self._copies = _Worker("copies of KV blocks", 1)
        num_readers, num_writers = (_NUM_READERS, _NUM_WRITERS) if store else (0, 0)
        self._reads = _Worker("reads of KV blocks", num_readers)
        self._writes = _Worker("writes of KV blocks", num_writers)
        self._blocks_at_once = max(1, _READ_BYTES // host.disk_block_bytes)
        self._local = threading.local()

    def submit(self, order: MoveOrder, on_moved: OnMoved) -> None:
        """Begin an order that `check_order` has accepted, after all rounds so far. Does not wait.

        A block that cannot be moved is an index in the result's `failed`."""
        indexes = range(len(order.digests or order.block_ids))
        if order.kind == MoveOrder.WRITE:
            worker, work, parts = self._writes, self._write, [indexes[i : i + 1] for i in indexes]
        elif order.kind == MoveOrder.READ:
            step = self._blocks_at_once
            worker, work, parts = self._reads, self._read, [indexes[i : i + step] for i in indexes[::step]]
        elif order.kind == MoveOrder.DROP:
            worker, work, parts = self._writes, self._drop, [indexes]
        else:
            worker, work, parts = self._copies, partial(self._copy, self._copier.mark()), [indexes]
        move = _Move(order, len(parts), self._generation, on_moved)
        for part in parts:
            worker.put(partial(work, move, part))

    def list_disk(self, on_listed: OnListed) -> None:
        """Tell the digests on disk, least recently written first. Not at all if the disk hangs."""
        self._reads.put(lambda: on_listed(self._disk.digests()))

    def reset(self) -> None:
        """Another scheduler has taken over. When this returns, slots and blocks are no longer touched by what was
        submitted before. Waits for a copy between device and host, but not for a disk."""
        self._begin_generation()
        self._copies.drain()

    def close(self, patience_s: float) -> None:
        """End all threads and close the store. What hangs for longer is left behind."""
        deadline_s = time.monotonic() + patience_s
        self._begin_generation()
        for worker in (self._copies, self._reads, self._writes):
            worker.stop(deadline_s)
        if self._store is not None:
            closing = threading.Thread(target=self._store.close, name="close of a disk tier", daemon=True)
            closing.start()
            closing.join(max(0.0, deadline_s - time.monotonic()))

    def _begin_generation(self) -> None:
        with self._slots_lock:
            self._generation += 1

    @property
    def _disk(self) -> Store:
        assert self._store is not None, "orders were checked"
        return self._store

    def _is_old(self, move: _Move) -> bool:
        return move.generation != self._generation

    def _copy(self, after: Mark, move: _Move, part: range) -> None:
        if self._is_old(move):
            return
        order = move.order
        copy = self._copier.store if order.kind == MoveOrder.STORE else self._copier.load
        move.begin()
        try:
            copy(order.block_ids, order.host_slots, after)
        except Exception as err:
            logger.exception("a copy of KV blocks failed")
            move.end(part, _text(err))
        else:
            move.end()

    def _write(self, move: _Move, part: range) -> None:
        order, (index,), (buffer, *_) = move.order, part, self._buffers()
        with self._slots_lock:
            if self._is_old(move):
                return
            self._host.copy_to(buffer, order.host_slots[index])
        move.begin()
        try:
            written = self._disk.write(order.digests[index], buffer)
        except Exception as err:  # noqa: BLE001  # whatever it is, the block is not on disk
            move.end(part, _text(err))
        else:
            move.end(evicted=written.evicted)

    def _read(self, move: _Move, part: range) -> None:
        if self._is_old(move):
            return
        order, buffers = move.order, self._buffers()[: len(part)]
        move.begin()
        try:
            found = self._disk.read_many([order.digests[index] for index in part], buffers)
        except Exception as err:  # noqa: BLE001  # whatever it is, there are no blocks
            move.end(part, _text(err))
            return
        with self._slots_lock:
            if self._is_old(move):
                return
            for index, buffer, is_there in zip(part, buffers, found, strict=True):
                if is_there:
                    self._host.fill(order.host_slots[index], buffer)
        failed = [index for index, is_there in zip(part, found, strict=True) if not is_there]
        error, num_damaged = self._disk.take_read_trouble() if failed else ("", 0)
        move.end(failed, error, num_damaged=num_damaged)

    def _drop(self, move: _Move, part: range) -> None:
        if self._is_old(move):
            return
        move.begin()
        try:
            self._disk.drop(move.order.digests)
        except Exception as err:  # noqa: BLE001  # the blocks may still be there, which does no harm
            move.end(part, _text(err))
        else:
            move.end()

    def _buffers(self) -> list[memoryview]:
        """Of this thread, each for a block."""
        if not hasattr(self._local, "buffers"):
            size, stride = self._host.disk_block_bytes, page_aligned(self._host.disk_block_bytes)
            memory = aligned_buffer(self._blocks_at_once * stride)
            self._local.buffers = [memory[at * stride : at * stride + size] for at in range(self._blocks_at_once)]
        buffers: list[memoryview] = self._local.buffers
        return buffers


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


class _Worker:
    """Threads that do jobs from a queue."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def drain(self) -> None:
        """Wait until one thread has come to this point."""
        reached = threading.Event()
        self._jobs.put(reached.set)
        reached.wait()

    def stop(self, deadline_s: float) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("%s: a job failed", threading.current_thread().name)
