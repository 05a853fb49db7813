"""KV blocks of one engine: who holds which, and which of them hold a known prefix.

A block is in one of three states. It is held by one seq or, for a shared prefix, by several. It is idle: no seq holds
it, but its contents are known and its digest finds it. Or it is free. Idle blocks are evicted in the order in which
they became idle. Nothing here scans the pool: every operation costs time in proportion to the blocks it moves.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice

from childproc.block_digests import Digest
from scheduler.kv_cache.contents import CacheContents


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How much is done at a time."""

    # Blocks evicted together are the pool divided by this, or more if needed: neighbours come back together and form
    # runs. Not measured.
    eviction_share: int = 64
    # Stale entries of the heap of runs are removed when it has more than this many and twice the runs; not measured.
    max_stale: int = 64


_TUNING = Tuning()


class FreeRuns:
    """Free block ids as maximal runs of consecutive ids.

    A seq grows into the id after its last block while that id is free, because attention over a run of blocks can read
    the cache without gathering. A new run starts in the middle of the longest one, so that the seq before it has room
    to grow.
    """

    def __init__(self, num_blocks: int) -> None:
        self._end_of: dict[int, int] = {}  # first id -> id after the last
        self._start_of: dict[int, int] = {}  # id after the last -> first id
        # (-length, end) of runs, longest first. Entries may be stale. A run is identified by its end, which
        # does not move while ids are taken from its front. Runs that are gone or shorter are noticed at the top.
        self._longest: list[tuple[int, int]] = []
        self.num_free = 0
        self.give(range(num_blocks))

    def take(self, after: int | None) -> int:
        """Take the id that follows `after` if it is free, else one that starts a new run. Some id must be free."""
        start = -1 if after is None else after + 1
        if start not in self._end_of:
            start = self._start_run()
        end = self._end_of.pop(start)
        if start + 1 < end:
            self._end_of[start + 1] = end
            self._start_of[end] = start + 1
        else:
            del self._start_of[end]
        self.num_free -= 1
        return start

    def give(self, block_ids: Iterable[int]) -> None:
        """Return ids; adjoining runs are joined."""
        ids = sorted(block_ids)
        self.num_free += len(ids)
        first = 0
        for i, block_id in enumerate(ids):
            if i + 1 == len(ids) or ids[i + 1] != block_id + 1:
                self._join(ids[first], block_id + 1)
                first = i + 1
        if len(self._longest) > 2 * len(self._start_of) + _TUNING.max_stale:
            self._longest = [(start - end, end) for end, start in self._start_of.items()]
            heapify(self._longest)

    def _join(self, start: int, end: int) -> None:
        if start in self._start_of:
            start = self._start_of.pop(start)
        if end in self._end_of:
            end = self._end_of.pop(end)
        self._end_of[start] = end
        self._start_of[end] = start
        heappush(self._longest, (start - end, end))

    def _start_run(self) -> int:
        while True:
            length, end = self._longest[0]
            start = self._start_of.get(end)
            if start is None:
                heappop(self._longest)
                continue
            if start - end != length:
                heappop(self._longest)
                heappush(self._longest, (start - end, end))
                continue
            return self._split(start, end)

    def _split(self, start: int, end: int) -> int:
        middle = (start + end) // 2
        if middle > start:
            self._end_of[start] = middle
            self._start_of[middle] = start
            heappush(self._longest, (start - middle, middle))
            self._end_of[middle] = end
            self._start_of[end] = middle
        return middle


class BlockManager:
    """Reference counts, prefix reuse and eviction for the blocks of one engine."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        contents: CacheContents | None = None,
    ) -> None:
        """`contents` hears which blocks can be found."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._contents = contents or CacheContents()
        self._free = FreeRuns(num_blocks)
        self._num_holders = [0] * num_blocks
        self._digest_of: list[Digest | None] = [None] * num_blocks
        self._is_rounded = [False] * num_blocks
        self._by_digest: dict[Digest, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, including idle ones."""
        return self._free.num_free + len(self._idle)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Allocate `count` blocks with one holder each, consecutive after `after` where possible."""
        assert count <= self.num_free, f"allocation of {count} blocks with {self.num_free} free"
        if count > self._free.num_free:
            self._evict(count - self._free.num_free)
        taken: list[int] = []
        for _ in range(count):
            after = self._free.take(after)
            self._num_holders[after] = 1
            self._is_rounded[after] = False
            taken.append(after)
        return taken

    def match(self, digests: Sequence[Digest]) -> list[int]:
        """The blocks of the longest known prefix of a digest chain. Does not hold them."""
        found: list[int] = []
        for digest in digests:
            block_id = self._by_digest.get(digest)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_idle_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks would stop being free if they were held."""
        return sum(self._num_holders[block_id] == 0 for block_id in block_ids)

    def num_held_once(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks will be free when one holder releases them."""
        return sum(self._num_holders[block_id] == 1 for block_id in block_ids)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Add a holder to each of these blocks (found by `match`)."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                del self._idle[block_id]
            self._num_holders[block_id] += 1

    def release(self, block_ids: Sequence[int], *, evict_first: bool = False) -> None:
        """Remove a holder from each. The end of a prefix becomes idle first: without its start it is worthless.
        `evict_first`: those that become idle are evicted before all others, in this order."""
        free: list[int] = []
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            assert self._num_holders[block_id] >= 0, f"block {block_id} released more often than held"
            if self._num_holders[block_id] > 0:
                continue
            if self._digest_of[block_id] is None:
                free.append(block_id)
            else:
                self._idle[block_id] = None
                if evict_first:
                    self._idle.move_to_end(block_id, last=False)
        self._free.give(free)

    def next_to_evict(self, num_taken: int) -> list[tuple[int, Digest]]:
        """The blocks that would be evicted if so many were allocated, in order, and the digests that find them."""
        num_evicted = max(0, num_taken - self._free.num_free)
        found = ((block_id, self._digest_of[block_id]) for block_id in islice(self._idle, num_evicted))
        return [(block_id, digest) for block_id, digest in found if digest is not None]

    def publish(self, block_id: int, digest: Digest) -> bool:
        """Let the block be found from now on: it is full, its tokens are committed and their KV is computed. Returns
        whether it will be: another block with the same contents may be known already."""
        if not self._caching or digest in self._by_digest:
            return False
        self._by_digest[digest] = block_id
        self._digest_of[block_id] = digest
        self._contents.add(digest)
        return True

    def mark_rounded(self, block_id: int) -> None:
        """Its KV is not what computing it from the tokens alone gives: it was rounded, or what it depends on was."""
        self._is_rounded[block_id] = True

    def has_rounded(self, block_ids: Iterable[int]) -> bool:
        return any(self._is_rounded[block_id] for block_id in block_ids)

    def has(self, block_id: int, digest: Digest) -> bool:
        """Whether the block is the one that is found by this digest."""
        return self._digest_of[block_id] == digest

    def forget(self, block_ids: Iterable[int]) -> list[Digest]:
        """Let these blocks not be found again. Returns the digests by which they were."""
        forgotten = [digest for block_id in block_ids if (digest := self._digest_of[block_id]) is not None]
        for digest in forgotten:
            self._digest_of[self._by_digest.pop(digest)] = None
            self._contents.remove(digest)
        return forgotten

    def _evict(self, count: int) -> None:
        count = min(len(self._idle), max(count, self.num_blocks // _TUNING.eviction_share))
        victims = [self._idle.popitem(last=False)[0] for _ in range(count)]
        self.forget(victims)
        self._free.give(victims)
