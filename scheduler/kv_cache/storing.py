"""From the device to host memory: each block once, when it is complete."""

from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from echelon.pb import worker_pb2
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.host import HostBlock, HostTier
from scheduler.kv_cache.moves import STORE, Moves
from scheduler.requests.digests import Digest


class _Store(NamedTuple):
    block_id: int
    host: HostBlock


class Storing:
    """Orders one store at a time, so that few device blocks are held by stores. `most`: blocks of one store.
    `on_stored`: told of each block that is in host memory."""

    def __init__(
        self, blocks: BlockManager, host: HostTier, moves: Moves, *, most: int, on_stored: Callable[[Digest], None]
    ) -> None:
        self._blocks = blocks
        self._host = host
        self._moves = moves
        self._most = most
        self._on_stored = on_stored
        self._waiting: deque[tuple[int, Digest]] = deque()

    def add(self, block_id: int, digest: Digest) -> None:
        if self._host.get(digest) is None:
            self._waiting.append((block_id, digest))

    def order(self, now: float) -> worker_pb2.MoveOrder | None:
        if self._moves.num_in_flight(STORE):
            return None
        stores: list[_Store] = []
        while self._waiting and len(stores) < self._most:
            block_id, digest = self._waiting.popleft()
            if self._host.get(digest) is not None:
                continue
            host = self._host.reserve(digest) if self._blocks.has(block_id, digest) else None
            if host is not None:  # otherwise it has left the device before its turn, or every slot is in use
                self._blocks.hold([block_id])
                stores.append(_Store(block_id, host))
        if not stores:
            return None
        return self._moves.order(
            STORE,
            now,
            partial(self._land, stores),
            block_ids=[store.block_id for store in stores],
            host_slots=[store.host.slot for store in stores],
        )

    def _land(self, stores: list[_Store], failed: Collection[int], now: float) -> None:
        for index, store in enumerate(stores):
            self._host.filled(store.host, is_right=index not in failed)
            if store.host.is_ready:
                self._on_stored(store.host.digest)
        self._blocks.release([store.block_id for store in stores])
