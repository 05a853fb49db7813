"""From host memory to disk: blocks that were used again, and old blocks before host memory evicts them."""

from collections.abc import Collection
from functools import partial
from itertools import islice
from math import inf

from childproc.block_digests import Digest
from echelon.pb import worker_pb2
from scheduler.kv_cache.disk import DiskTier
from scheduler.kv_cache.host import HostBlock, HostTier
from scheduler.kv_cache.moves import DROP, WRITE, Moves


class Writing:
    """`most`: blocks of one write; `most_in_flight`: writes; `num_spare`: host slots to keep free; `looks`: old blocks
    to look at for each slot to be freed."""

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier,
        moves: Moves,
        *,
        most: int,
        most_in_flight: int,
        num_spare: int,
        looks: int,
    ) -> None:
        self._host = host
        self._disk = disk
        self._moves = moves
        self._most = most
        self._most_in_flight = most_in_flight
        self._num_spare = num_spare
        self._looks = looks
        self._waiting: dict[Digest, None] = {}
        self._to_drop: list[Digest] = []

    def add(self, digest: Digest) -> None:
        """Write the block when its turn comes. A disk that is left alone for long loses some."""
        if len(self._waiting) < self._host.num_slots:
            self._waiting[digest] = None

    def add_all(self) -> None:
        """Write all that host memory holds: the process is about to end. What was used last goes first."""
        self._waiting = dict.fromkeys(block.digest for block in reversed(list(self._host.oldest())))

    def is_done(self, now: float) -> bool:
        """Whether nothing is written or could be."""
        if not self._disk.may(self._disk.writes, now):
            return True
        return not self._waiting and not self._moves.num_in_flight(WRITE)

    def next_trial(self) -> float:
        """When the pause is over that keeps blocks waiting; inf if there is none."""
        if not self._waiting or self._moves.num_in_flight(WRITE) or not self._disk.writes.are_failing:
            return inf
        return self._disk.writes.paused_until_s

    def forget(self, digest: Digest) -> None:
        self._waiting.pop(digest, None)
        if digest in self._disk:
            self._disk.discard(digest)
            self._to_drop.append(digest)

    def order(self, now: float) -> worker_pb2.MoveOrder | None:
        if self._to_drop:
            digests, self._to_drop = self._to_drop, []
            return self._moves.order(DROP, now, lambda failed, now: None, digests=digests)
        if not self._disk.may(self._disk.writes, now) or self._moves.num_in_flight(WRITE) >= self._most_in_flight:
            return None
        writes = self._next_waiting() or self._next_oldest()
        if not writes:
            return None
        for block in writes:
            self._host.pin(block)
            block.is_being_written = True
        return self._moves.order(
            WRITE,
            now,
            partial(self._complete, writes),
            host_slots=[block.slot for block in writes],
            digests=[block.digest for block in writes],
        )

    def _next_waiting(self) -> list[HostBlock]:
        writes: list[HostBlock] = []
        while self._waiting and len(writes) < self._most:
            digest = next(iter(self._waiting))
            del self._waiting[digest]
            block = self._host.ready(digest)
            if block is not None and not block.is_being_written and digest not in self._disk:
                writes.append(block)
        return writes

    def _next_oldest(self) -> list[HostBlock]:
        """Make room in host memory before it is needed: old blocks that are on disk go, others are to be written."""
        missing = self._num_spare - self._host.num_free
        writes: list[HostBlock] = []
        for block in list(islice(self._host.oldest(), max(0, self._looks * missing))):
            if missing <= 0 or len(writes) >= self._most:
                break
            if not block.is_ready or block.num_pins:
                continue
            if block.digest in self._disk:
                self._host.evict(block)
            else:
                writes.append(block)
            missing -= 1
        return writes

    def _complete(self, writes: list[HostBlock], failed: Collection[int], now: float) -> None:
        for index, block in enumerate(writes):
            block.is_being_written = False
            if index in failed:
                self.add(block.digest)  # when the disk works again, something must try it
            elif block.is_known:
                self._disk.add(block.digest)
            else:
                self._to_drop.append(block.digest)  # it was forgotten meanwhile
            self._host.unpin(block)
