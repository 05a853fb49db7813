"""From disk and host memory to the device: the blocks of a prefix, in order."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from math import inf

from childproc.block_digests import Digest
from echelon.pb import worker_pb2
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.disk import DiskTier
from scheduler.kv_cache.fetch_times import FetchTimes
from scheduler.kv_cache.gains import Gains
from scheduler.kv_cache.host import HostBlock, HostTier
from scheduler.kv_cache.moves import LOAD, READ, Moves


@dataclass(slots=True, eq=False, kw_only=True)
class Fetch:
    """Device blocks that are being filled with the blocks of a prefix. Seqs wait for it until `is_over`.

    It may end early, before a block that did not come or at its deadline. What has come by then stays.
    """

    digests: Sequence[Digest]
    block_ids: list[int]  # on the device, one for each digest
    held_ids: list[int]  # the prefix before them, kept on the device meanwhile
    num_from_host: int  # leading blocks that were in host memory when it began; the rest were on disk
    began_s: float
    deadline_s: float
    recompute_s: Callable[[int], float]  # seconds to compute the tokens of so many blocks
    num_waiting: int = 1  # seqs
    is_over: bool = False
    limit: int = field(init=False)  # blocks that may still come: all before the first that did not
    has_come: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.limit = len(self.digests)
        self.has_come = [False] * len(self.digests)

    @property
    def num_come(self) -> int:
        """Leading blocks that are on the device."""
        return next((i for i in range(self.limit) if not self.has_come[i]), self.limit)


@dataclass(slots=True, eq=False)
class _Wanted:
    """One block of a fetch."""

    fetch: Fetch
    index: int

    @property
    def is_still(self) -> bool:
        return self.index < self.fetch.limit

    @property
    def block_id(self) -> int:
        return self.fetch.block_ids[self.index]

    @property
    def digest(self) -> Digest:
        return self.fetch.digests[self.index]


@dataclass(slots=True, eq=False)
class _Load:
    wanted: _Wanted
    host: HostBlock


class Fetching:
    """A block on disk comes through a slot of host memory. A block that is loaded has a held device block and a pinned
    slot until the load is answered, even if nobody waits for it any more.

    `most`: blocks of one move. `most_reads`: in flight. `most_reading`: slots of host memory that reads fill; a disk
    that hangs leaves the others. `rounds`: host memory and disk hold fewer bits than the device. `ignores_prices`: all
    that is there is worthwhile.
    """

    def __init__(
        self,
        blocks: BlockManager,
        host: HostTier,
        disk: DiskTier,
        moves: Moves,
        *,
        timeout_s: float,
        most: int,
        most_reads: int,
        most_reading: int,
        rounds: bool,
        ignores_prices: bool = False,
    ) -> None:
        self._blocks = blocks
        self._host = host
        self._disk = disk
        self._moves = moves
        self._timeout_s = timeout_s
        self._most = most
        self._most_reads = most_reads
        self._most_reading = most_reading
        self._rounds = rounds
        self._ignores_prices = ignores_prices
        self.gains = Gains()
        self._times = FetchTimes()  # of blocks in host memory
        self._disk_times = FetchTimes()  # of blocks on disk, beyond that
        self._active: dict[Digest, Fetch] = {}  # not over yet, by their first digest
        self._loading: set[int] = set()  # device blocks
        self._to_load: deque[_Load] = deque()
        self._reading: dict[Digest, list[_Wanted]] = {}  # what each block is read for, from when that is decided
        self._to_read: deque[HostBlock] = deque()

    # -- what may be fetched ------------------------------------------------------------------------------------------

    def num_worthwhile(self, digests: Sequence[Digest], now: float, *, recompute_s: Callable[[int], float]) -> int:
        """How many of these consecutive blocks are faster to fetch than to compute.
        `recompute_s`: seconds to compute the tokens of so many blocks."""
        num_host = self._num_in_host(digests)
        num_known = (
            sum(1 for _ in takewhile(self._may_come, digests)) if self._disk.may(self._disk.reads, now) else num_host
        )
        if self._ignores_prices:
            return num_known
        host_gain = recompute_s(num_host) - self._times.seconds(num_host)
        disk_s = self._times.seconds(num_known) + self._disk_times.seconds(num_known - num_host)
        if num_known > num_host:
            if recompute_s(num_known) - disk_s > max(0.0, host_gain):
                return num_known
            self._disk_times.refused()
        if num_host and host_gain <= 0.0:
            self._times.refused()
            return 0
        return num_host

    def _num_in_host(self, digests: Sequence[Digest]) -> int:
        return sum(1 for _ in takewhile(lambda digest: self._host.ready(digest) is not None, digests))

    def _may_come(self, digest: Digest) -> bool:
        return self._host.ready(digest) is not None or digest in self._reading or digest in self._disk

    # -- fetches ------------------------------------------------------------------------------------------------------

    def join(self, digest: Digest) -> Fetch | None:
        """Wait for the fetch that begins with this block too, if there is one."""
        fetch = self._active.get(digest)
        if fetch is not None:
            fetch.num_waiting += 1
        return fetch

    def start(
        self, digests: Sequence[Digest], held_ids: list[int], now: float, *, recompute_s: Callable[[int], float]
    ) -> Fetch:
        """Bring these blocks to the device, which has room for them. `held_ids`: device blocks of the prefix before
        them. `recompute_s`: as for num_worthwhile."""
        self._blocks.hold(held_ids)
        fetch = Fetch(
            digests=digests,
            block_ids=self._blocks.allocate(len(digests), held_ids[-1] if held_ids else None),
            held_ids=held_ids,
            num_from_host=self._num_in_host(digests),
            began_s=now,
            deadline_s=now + self._timeout_s,
            recompute_s=recompute_s,
        )
        self._active[digests[0]] = fetch
        for index in range(len(digests)):
            self._begin(_Wanted(fetch, index))
        self._end_finished(now)
        return fetch

    def leave(self, fetch: Fetch) -> None:
        """A seq waits no longer, or has taken the blocks. The last one to leave lets them go."""
        fetch.num_waiting -= 1
        if fetch.num_waiting > 0:
            return
        if not fetch.is_over:
            self._end(fetch)
        self._blocks.release([*fetch.held_ids, *fetch.block_ids[: fetch.limit]])

    def expire(self, now: float) -> None:
        """End the fetches whose time is over, and those that wait for a disk that is left alone."""
        if not self._disk.may(self._disk.reads, now):
            self._give_up_reads(now)
        for fetch in [fetch for fetch in self._active.values() if now >= fetch.deadline_s]:
            self._count(fetch, now)
            self._end(fetch)

    def next_deadline(self) -> float:
        return min((fetch.deadline_s for fetch in self._active.values()), default=inf)

    def _begin(self, wanted: _Wanted) -> None:
        """Queue the move that brings the block to the device, or first to host memory."""
        if not wanted.is_still:
            return
        digest = wanted.digest
        host = self._host.get(digest)
        if host is not None and host.is_ready:
            self._host.pin(host)
            self._to_load.append(_Load(wanted, host))
        elif digest in self._reading:
            self._reading[digest].append(wanted)
        elif host is None and (slot := self._reserve(digest)) is not None:
            self._reading[digest] = [wanted]
            self._to_read.append(slot)
        else:
            self._cut(wanted.fetch, wanted.index)

    def _reserve(self, digest: Digest) -> HostBlock | None:
        return self._host.reserve(digest) if len(self._reading) < self._most_reading else None

    def _cut(self, fetch: Fetch, limit: int) -> None:
        """Blocks from `limit` on will not be used. Those that are being loaded are held until the load is answered."""
        dropped = fetch.block_ids[limit : fetch.limit]
        self._blocks.release([block_id for block_id in dropped if block_id not in self._loading])
        fetch.limit = min(limit, fetch.limit)

    def _end(self, fetch: Fetch) -> None:
        self._cut(fetch, fetch.num_come)
        fetch.is_over = True
        del self._active[fetch.digests[0]]

    def _end_finished(self, now: float) -> None:
        """End the fetches for which all has come that will come."""
        for fetch in [fetch for fetch in self._active.values() if fetch.num_come == fetch.limit]:
            if fetch.limit == len(fetch.digests):
                self._measure(fetch, now)
            self._count(fetch, now)
            self._end(fetch)

    def _count(self, fetch: Fetch, now: float) -> None:
        self.gains.add(
            len(fetch.digests),
            fetch.num_from_host,
            fetch.num_come,
            avoided_s=fetch.recompute_s(fetch.num_come),
            waited_s=now - fetch.began_s,
        )

    def _measure(self, fetch: Fetch, now: float) -> None:
        num_blocks, seconds = len(fetch.digests), now - fetch.began_s
        if fetch.num_from_host == num_blocks:
            self._times.observe(num_blocks, seconds)
        else:
            beyond_s = max(0.0, seconds - self._times.seconds(num_blocks))
            self._disk_times.observe(num_blocks - fetch.num_from_host, beyond_s)

    # -- moves --------------------------------------------------------------------------------------------------------

    def orders(self, now: float) -> Iterator[worker_pb2.MoveOrder]:
        while loads := self._next_loads():
            yield self._moves.order(
                LOAD,
                now,
                partial(self._complete_loads, loads),
                block_ids=[load.wanted.block_id for load in loads],
                host_slots=[load.host.slot for load in loads],
            )
        while self._moves.num_in_flight(READ) < self._most_reads and (reads := self._next_reads()):
            yield self._moves.order(
                READ,
                now,
                partial(self._complete_reads, reads),
                host_slots=[host.slot for host in reads],
                digests=[host.digest for host in reads],
            )

    def _next_loads(self) -> list[_Load]:
        loads: list[_Load] = []
        while self._to_load and len(loads) < self._most:
            load = self._to_load.popleft()
            if load.wanted.is_still:
                loads.append(load)
                self._loading.add(load.wanted.block_id)
            else:
                self._host.unpin(load.host)
        return loads

    def _next_reads(self) -> list[HostBlock]:
        reads: list[HostBlock] = []
        while self._to_read and len(reads) < self._most:
            host = self._to_read.popleft()
            if any(wanted.is_still for wanted in self._reading[host.digest]):
                reads.append(host)
            else:
                self._miss(host)
        return reads

    def _give_up_reads(self, now: float) -> None:
        while self._to_read:
            self._miss(self._to_read.popleft())
        self._end_finished(now)

    def _miss(self, host: HostBlock) -> None:
        """The block that the slot was reserved for does not come."""
        self._host.filled(host, is_right=False)
        for wanted in self._reading.pop(host.digest):
            if wanted.is_still:
                self._cut(wanted.fetch, wanted.index)

    def _complete_reads(self, reads: list[HostBlock], failed: Collection[int], now: float) -> None:
        for index, host in enumerate(reads):
            if index in failed or not host.is_known:
                self._disk.discard(host.digest)
                self._miss(host)
                continue
            self._host.filled(host, is_right=True)
            for wanted in self._reading.pop(host.digest):
                self._begin(wanted)
        self._end_finished(now)

    def _complete_loads(self, loads: list[_Load], failed: Collection[int], now: float) -> None:
        for index, load in enumerate(loads):
            wanted, is_right = load.wanted, index not in failed and load.host.is_known
            self._loading.remove(wanted.block_id)
            self._host.unpin(load.host)
            if not wanted.is_still:
                self._blocks.release([wanted.block_id])
            elif is_right:
                wanted.fetch.has_come[wanted.index] = True
                if self._rounds:
                    self._blocks.mark_rounded(wanted.block_id)
                self._blocks.publish(wanted.block_id, wanted.digest)
            else:
                self._cut(wanted.fetch, wanted.index)
        self._end_finished(now)
