"""What the tiers choose to fetch is hardly ever slower than computing it, whatever the tiers' speed and noise."""

import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from echelon.pb import worker_pb2
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.contents import CacheContents
from scheduler.kv_cache.disk import DiskTier
from scheduler.kv_cache.fetching import Fetching
from scheduler.kv_cache.host import HostTier
from scheduler.kv_cache.moves import READ, Moves

NUM_BLOCKS = 64
RECOMPUTE_S = 0.01  # a block
NUM_HITS = 600
DIGESTS = [bytes([number]) * 16 for number in range(NUM_BLOCKS)]


@dataclass
class Machine:
    """Whose moves take random times. `fixed_s` of a fetch, `block_s` of each block, `noise` of all of it."""

    fixed_s: float
    block_s: float
    noise: float = 0.0
    on_disk: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    now: float = 0.0

    def __post_init__(self) -> None:
        contents = CacheContents()
        self.blocks = BlockManager(NUM_BLOCKS, 4)
        self.host, self.disk = HostTier(NUM_BLOCKS, contents), DiskTier(NUM_BLOCKS, contents)
        self.moves = Moves(1)
        self.disk.announce(DIGESTS if self.on_disk else [], is_last=True)
        self.fetching = Fetching(
            self.blocks,
            self.host,
            self.disk,
            self.moves,
            timeout_s=1e9,
            most=NUM_BLOCKS,
            most_reads=8,
            most_reading=NUM_BLOCKS,
            rounds=False,
        )

    def hit(self, num_blocks: int) -> tuple[int, float]:
        """A prefix of so many blocks was asked for: how many were fetched, and the time to have all of them."""
        digests = DIGESTS[:num_blocks]
        if not self.on_disk:
            for digest in digests:
                if self.host.get(digest) is None:
                    block = self.host.reserve(digest)
                    assert block is not None
                    self.host.filled(block, is_right=True)
        wanted = self.fetching.num_worthwhile(digests, self.now, recompute_s=lambda n: RECOMPUTE_S * n)
        if not wanted:
            return 0, RECOMPUTE_S * num_blocks
        began_s = self.now
        fetch = self.fetching.start(digests[:wanted], [], self.now, recompute_s=lambda n: RECOMPUTE_S * n)
        while not fetch.is_over:
            for order in list(self.fetching.orders(self.now)):
                self.now += self._move_s(order, wanted)
                self.moves.complete(worker_pb2.MoveResult(move_id=order.move_id), self.now)
        self.fetching.leave(fetch)
        self.blocks.forget(fetch.block_ids)
        if self.on_disk:
            for digest in digests:
                self.host.forget(digest)
        return wanted, self.now - began_s + RECOMPUTE_S * (num_blocks - wanted)

    def _move_s(self, order: worker_pb2.MoveOrder, num_blocks: int) -> float:
        if self.on_disk and order.kind != READ:
            return 1e-5
        return (self.fixed_s + self.block_s * num_blocks) * self.rng.lognormvariate(0.0, self.noise)

    def hits(self) -> Iterator[tuple[int, int, float]]:
        """Endless: blocks, those of them that were fetched, and the time in units of that of computing them."""
        while True:
            num_blocks = self.rng.randint(1, NUM_BLOCKS)
            fetched, seconds = self.hit(num_blocks)
            yield num_blocks, fetched, seconds / (RECOMPUTE_S * num_blocks)


SPEEDS = {
    "fast": (0.001, 0.001),
    "slow to begin": (0.2, 0.001),
    "as fast as computing": (0.0, RECOMPUTE_S),
    "a little faster": (0.001, 0.93 * RECOMPUTE_S),
    "three times slower": (0.01, 3 * RECOMPUTE_S),
    "hundred times slower": (0.01, 100 * RECOMPUTE_S),
}


@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("speed", SPEEDS)
def test_nineteen_of_twenty_hits_are_no_slower_than_computing(speed: str, noise: float, on_disk: bool) -> None:
    machine = Machine(*SPEEDS[speed], noise=noise, on_disk=on_disk)
    hits = list(itertools.islice(machine.hits(), NUM_HITS))
    assert statistics.quantiles((time for _, _, time in hits), n=20)[-1] <= 1.05
    if speed == "fast":
        assert statistics.median(time for _, _, time in hits) < 0.3
        assert sum(fetched for _, fetched, _ in hits) > 0.9 * sum(num_blocks for num_blocks, _, _ in hits)


def until(machine: Machine, condition: Callable[[int, float], bool]) -> int:
    """Hits until one of at least 16 blocks is fetched like that."""
    for number, (num_blocks, fetched, time) in enumerate(machine.hits()):
        if num_blocks >= 16 and condition(fetched, time):
            return number
        assert number < NUM_HITS
    raise AssertionError


def test_a_tier_that_was_slow_is_tried_again_when_it_may_be_fast() -> None:
    machine = Machine(*SPEEDS["three times slower"], noise=0.1)
    list(itertools.islice(machine.hits(), 100))
    machine.fixed_s, machine.block_s = SPEEDS["fast"]
    assert until(machine, lambda fetched, time: fetched > 0 and time < 0.5) < 200
    tried = list(itertools.islice(machine.hits(), 100))
    assert sum(fetched > 0 for _, fetched, _ in tried) > 50
