"""Host memory and disk of a fake engine."""

from collections.abc import Collection
from dataclasses import dataclass, field

from echelon.pb import worker_pb2

Contents = tuple[int | None, ...]  # of one block, by offset: hash of the prefix to there; None: never written

STORE, LOAD = worker_pb2.MoveOrder.STORE, worker_pb2.MoveOrder.LOAD
WRITE, READ, DROP = worker_pb2.MoveOrder.WRITE, worker_pb2.MoveOrder.READ, worker_pb2.MoveOrder.DROP


class SchedulerFaultError(AssertionError):
    """The scheduler sent what no correct scheduler sends."""


@dataclass(slots=True, kw_only=True)
class FakeTiers:
    """What host slots and the disk hold. The disk outlives the engine and keeps its newest blocks."""

    num_slots: int
    num_disk_blocks: int = 0
    host: dict[int, Contents] = field(default_factory=dict)
    disk: dict[bytes, Contents] = field(default_factory=dict)
    num_moved: dict["worker_pb2.MoveOrder.Kind.ValueType", int] = field(default_factory=dict)  # blocks
    _read: list[int] = field(default_factory=list)  # slots that moves in flight read
    _filled: list[int] = field(default_factory=list)  # slots that they fill

    def contents(self) -> worker_pb2.DiskContents:
        return worker_pb2.DiskContents(digests=self.disk, is_last=True)

    def reset(self) -> None:
        """A new stream: moves in flight are over."""
        self._read.clear()
        self._filled.clear()

    def order(self, order: worker_pb2.MoveOrder) -> None:
        """A move is in flight from now on."""
        busy = {*self._filled, *(self._read if order.kind in (STORE, READ) else ())}
        if busy & set(order.host_slots):
            raise SchedulerFaultError(f"violated: slots {busy & set(order.host_slots)} are in use by another move")
        (self._filled if order.kind in (STORE, READ) else self._read).extend(order.host_slots)

    def run(
        self, order: worker_pb2.MoveOrder, blocks: dict[int, Contents], fails: Collection[int] = (), error: str = ""
    ) -> worker_pb2.MoveResult:
        """Do the move. `blocks`: the device's, read and changed. `fails`: indexes of blocks that do not arrive."""
        for slot in order.host_slots:
            (self._filled if order.kind in (STORE, READ) else self._read).remove(slot)
        result = worker_pb2.MoveResult(move_id=order.move_id, incarnation=order.incarnation, failed=fails, error=error)
        for index in range(max(len(order.host_slots), len(order.digests))):
            if index not in fails and not self._move(order, index, blocks):
                result.failed.append(index)
        self.num_moved[order.kind] = self.num_moved.get(order.kind, 0) + len(order.host_slots) - len(result.failed)
        while len(self.disk) > self.num_disk_blocks:
            oldest = next(iter(self.disk))
            del self.disk[oldest]
            result.evicted.append(oldest)
        result.run_ns = 1_000_000
        return result

    def _move(self, order: worker_pb2.MoveOrder, index: int, blocks: dict[int, Contents]) -> bool:
        match order.kind:
            case worker_pb2.MoveOrder.STORE:
                self.host[order.host_slots[index]] = blocks[order.block_ids[index]]
            case worker_pb2.MoveOrder.LOAD:
                blocks[order.block_ids[index]] = self.host[order.host_slots[index]]
            case worker_pb2.MoveOrder.WRITE:
                self.disk.setdefault(order.digests[index], self.host[order.host_slots[index]])
            case worker_pb2.MoveOrder.READ:
                found = self.disk.get(order.digests[index])
                self.host[order.host_slots[index]] = () if found is None else found
                return found is not None
            case worker_pb2.MoveOrder.DROP:
                self.disk.pop(order.digests[index], None)
        return True
