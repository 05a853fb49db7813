"""From the device to host memory: each block once, when it is complete or when the device is about to evict it."""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

from childproc.block_digests import Digest
from echelon.pb import worker_pb2
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.host import HostBlock, HostTier
from scheduler.kv_cache.moves import STORE, WRITE, Moves


class _Store(NamedTuple):
    block_id: int
    host: HostBlock


class Storing:
    """Orders few blocks at a time: so a load waits little for them, seqs that grow find free blocks, and host memory
    has free slots for them, without evicting what is to be written to disk.

    `most`: blocks of one store. `most_in_flight`: of all stores. `num_spare`: device blocks that stay free, whatever is
    stored. `most_slots`: of host memory that stores and writes to disk may fill and empty at once. `look_ahead`: blocks
    are stored when the device would evict them to allocate so many; None: when `add` names them. `on_stored`: called
    for each block in host memory.
    """

    def __init__(
        self,
        blocks: BlockManager,
        host: HostTier,
        moves: Moves,
        *,
        most: int,
        most_in_flight: int,
        num_spare: int,
        most_slots: int,
        look_ahead: int | None,
        on_stored: Callable[[Digest], None],
    ) -> None:
        self._blocks = blocks
        self._host = host
        self._moves = moves
        self._most = most
        self._most_in_flight = most_in_flight
        self._num_spare = num_spare
        self._most_slots = most_slots
        self._look_ahead = look_ahead
        self._on_stored = on_stored
        self._waiting: deque[tuple[int, Digest]] = deque()
        self._in_flight: set[int] = set()  # device blocks
        self._stored: set[int] = set()  # of those that the device is about to evict

    @property
    def num_held_alone(self) -> int:
        """Device blocks in flight that no seq holds."""
        return self._blocks.num_held_once(self._in_flight)

    def add(self, block_id: int, digest: Digest) -> None:
        """The block is complete, or used again."""
        if self._look_ahead is None:
            self._want(block_id, digest)

    def add_all(self) -> None:
        """Store all that the device holds and no seq uses: the process is about to end."""
        if self._look_ahead is not None:
            self._look_ahead = self._blocks.num_blocks
            self._find_leaving(self._look_ahead)

    @property
    def is_done(self) -> bool:
        """Whether nothing is stored or waits for it."""
        return not self._waiting and not self._in_flight

    def _want(self, block_id: int, digest: Digest) -> None:
        if self._host.get(digest) is None:
            self._waiting.append((block_id, digest))

    def orders(self, now: float) -> Iterator[worker_pb2.MoveOrder]:
        if self._look_ahead is not None:
            self._find_leaving(self._look_ahead)
        while stores := self._next():
            yield self._moves.order(
                STORE,
                now,
                partial(self._complete, stores),
                block_ids=[store.block_id for store in stores],
                host_slots=[store.host.slot for store in stores],
            )

    def _find_leaving(self, num_taken: int) -> None:
        """Those that the device would evict to allocate so many. A small host tier may evict one of them first: it is
        not stored again unless it is used again."""
        leaving = self._blocks.next_to_evict(num_taken - self.num_held_alone)  # those in flight go first
        self._stored.intersection_update(block_id for block_id, _ in leaving)
        self._waiting.clear()
        for block_id, digest in leaving:
            if block_id not in self._stored:
                self._want(block_id, digest)

    def _next(self) -> list[_Store]:
        stores: list[_Store] = []
        later: list[tuple[int, Digest]] = []
        most = self._most_now()
        while self._waiting and len(stores) < most:
            block_id, digest = self._waiting.popleft()
            if self._host.get(digest) is not None or not self._blocks.has(block_id, digest):
                continue  # it is there already, or has left the device before its turn
            if self._blocks.num_free <= self._num_spare and self._blocks.num_idle_among([block_id]):
                later.append((block_id, digest))
            elif (host := self._host.reserve(digest)) is not None:  # otherwise every slot is in use
                self._blocks.hold([block_id])
                self._in_flight.add(block_id)
                stores.append(_Store(block_id, host))
        self._waiting.extendleft(reversed(later))
        return stores

    def _most_now(self) -> int:
        """Blocks of the next store."""
        in_flight = self._moves.num_blocks_in_flight
        num_slots = self._most_slots - in_flight(STORE, WRITE)
        return min(self._most, self._most_in_flight - in_flight(STORE), num_slots)

    def _complete(self, stores: list[_Store], failed: Collection[int], now: float) -> None:
        for index, store in enumerate(stores):
            self._host.filled(store.host, is_right=index not in failed)
            if store.host.is_ready:
                self._on_stored(store.host.digest)
        self._in_flight.difference_update(store.block_id for store in stores)
        block_ids = [store.block_id for store in stores]
        if self._look_ahead is not None:
            self._stored.update(block_ids)
        # What the device was about to evict still goes first.
        self._blocks.release(block_ids, evict_first=self._look_ahead is not None)
