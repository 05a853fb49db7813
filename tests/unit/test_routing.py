"""Requests go where their prefixes are cached, unless others have far less to do."""

import asyncio
import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from bench.route import Load, compare
from childproc.block_digests import Digest, DigestChain, root_digest, short_digest
from echelon.pb.scheduler_pb2 import CacheReport, Submit
from gateway.replicas.routing import CachedBlocks, Router, find_matches
from scheduler.kv_cache.contents import CacheContents, CacheWatch

SIZE = 4


@dataclass(eq=False)
class FakeReplica:
    load: int = 0
    cache: CachedBlocks = field(default_factory=CachedBlocks)

    def cached(self, token_ids: list[int], salt: str = "") -> "FakeReplica":
        digests = chain(token_ids, salt)
        self.cache.on_report(CacheReport(block_size=SIZE, num_blocks=1000, added=map(short_digest, digests)))
        return self


def chain(token_ids: list[int], salt: str = "") -> list[Digest]:
    return DigestChain(root_digest("m", SIZE, salt), SIZE).extend(token_ids, len(token_ids) // SIZE)


def submit(token_ids: list[int], salt: str = "") -> Submit:
    return Submit(prompt_token_ids=token_ids, cache_salt=salt)


def choose(router: Router, message: Submit, replicas: list[FakeReplica], model: str = "m") -> FakeReplica:
    return router.choose(asyncio.run(find_matches(model, message, replicas)), replicas)


def test_the_longest_cached_prefix_wins_and_on_a_miss_the_least_load() -> None:
    prompt = list(range(40))
    short, long, idle = FakeReplica(3).cached(prompt[:8]), FakeReplica(3).cached(prompt[:32]), FakeReplica(2)
    router = Router()
    assert choose(router, submit(prompt), [short, long, idle]) is long
    assert choose(router, submit(prompt[:12]), [idle, short, FakeReplica(5)]) is short
    assert choose(router, submit([7, *prompt]), [short, long, idle]) is idle, "another beginning"
    assert choose(router, submit(prompt, salt="mine"), [short, long, idle]) is idle, "other salts share nothing"
    assert choose(router, submit(prompt), [short, long, idle], model="another") is idle


def test_the_last_token_of_a_prompt_is_computed_wherever_it_is_cached() -> None:
    prompt = list(range(SIZE))
    assert choose(Router(), submit(prompt), [FakeReplica(1).cached(prompt), idle := FakeReplica(0)]) is idle


def test_a_prefix_does_not_overload_a_replica() -> None:
    prompt = list(range(40))
    holder, half, other = FakeReplica(20).cached(prompt), FakeReplica(9).cached(prompt[:20]), FakeReplica(8)
    assert choose(Router(), submit(prompt), [holder, half, other]) is half, "the next longest"
    holder.load = 12
    assert choose(Router(), submit(prompt), [holder, half, other]) is holder


def test_without_differences_replicas_take_turns() -> None:
    replicas = [FakeReplica() for _ in range(3)]
    router = Router()
    chosen = [choose(router, submit([number] * 9), replicas) for number in range(9)]
    assert all(first is not second for first, second in pairwise(chosen))
    assert {chosen.count(replica) for replica in replicas} == {3}


def test_a_new_replica_gets_its_share_and_not_everything() -> None:
    replicas = [FakeReplica() for _ in range(2)]
    router = Router()
    for number in range(60):
        choose(router, submit([number] * 9), replicas)
    replicas.append(FakeReplica())
    chosen = [choose(router, submit([number] * 9), replicas) for number in range(60, 90)]
    assert [chosen.count(replica) for replica in replicas] == [10, 10, 10]


def test_a_common_beginning_spreads_to_all_and_a_conversation_stays() -> None:
    replicas = [FakeReplica() for _ in range(3)]
    router = Router()
    system, rng = list(range(32)), random.Random(0)
    first = [choose(router, submit([*system, *rng.choices(range(99), k=8)]), replicas).cached(system) for _ in range(9)]
    assert set(map(id, first)) == set(map(id, replicas))
    conversation = system
    holder = replicas[1]
    for _ in range(6):
        conversation = [*conversation, *rng.choices(range(99), k=12)]
        holder.cached(conversation)
        assert choose(router, submit([*conversation, 1]), replicas) is holder


def test_a_beginning_that_fills_caches_is_not_copied() -> None:
    document = list(range(SIZE * 500))  # half of the cache
    replicas = [FakeReplica().cached(document), FakeReplica()]
    router = Router()
    assert all(choose(router, submit([*document, number]), replicas) is replicas[0] for number in range(9))


async def test_a_long_prompt_lets_others_have_their_turn() -> None:
    prompt = list(range(SIZE * 5000))
    replicas = [FakeReplica().cached(prompt), FakeReplica().cached(prompt[: SIZE * 4000])]
    finding, num_turns = asyncio.create_task(find_matches("m", submit(prompt), replicas)), 0
    while not finding.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns > 10
    found = finding.result()
    assert [found[id(replica)].num_blocks for replica in replicas] == [4999, 4000]


def test_reports_in_any_pace_tell_what_the_cache_holds() -> None:
    rng = random.Random(1)
    contents, tiers = CacheContents(), [set[Digest]() for _ in range(3)]
    watches: list[tuple[CacheWatch, CachedBlocks]] = []
    for step in range(4000):
        if step % 1000 == 0:
            watches.append((contents.watch(), CachedBlocks()))
        tier, digest = rng.choice(tiers), rng.randrange(60).to_bytes(16, "little")
        if digest in tier:
            tier.remove(digest)
            contents.remove(digest)
        else:
            tier.add(digest)
            contents.add(digest)
        if rng.random() < 0.1:
            tell(*rng.choice(watches))
    for watch, cache in watches:
        tell(watch, cache)
        assert not watch.has_changes
        assert {digest for digest in range(60) if digest in cache} == {
            short_digest(digest) for digest in set().union(*tiers)
        }


def tell(watch: CacheWatch, cache: CachedBlocks) -> None:
    changes = watch.take()
    assert len(changes.added) + len(changes.removed) <= 60, "a block is reported once"
    assert not set(changes.added) & set(changes.removed)
    cache.on_report(CacheReport(from_nothing=changes.from_nothing, added=changes.added, removed=changes.removed))


def test_a_large_cache_is_reported_in_parts() -> None:
    contents, cache = CacheContents(), CachedBlocks()
    for number in range(20_000):
        contents.add(number.to_bytes(16, "little"))
    watch = contents.watch()
    num_reports = 0
    while watch.has_changes:
        tell_part(watch, cache)
        num_reports += 1
    assert num_reports == 3
    assert all(number in cache for number in range(20_000))
    contents.unwatch(watch)
    contents.remove((5).to_bytes(16, "little"))
    assert not watch.has_changes, "nobody listens any more"


def test_a_new_stream_begins_from_nothing() -> None:
    contents, cache = CacheContents(), CachedBlocks()
    cache.on_report(CacheReport(block_size=SIZE, added=[1, 2, 3]))
    contents.add((3).to_bytes(16, "little"))
    tell_part(contents.watch(), cache)
    assert [number for number in range(9) if number in cache] == [3]


def tell_part(watch: CacheWatch, cache: CachedBlocks) -> None:
    changes = watch.take()
    cache.on_report(CacheReport(from_nothing=changes.from_nothing, added=changes.added, removed=changes.removed))


@pytest.mark.parametrize("seed", [0, 1])
def test_three_replicas_find_as_much_as_one_with_three_times_the_memory(seed: int) -> None:
    outcomes = compare(Load(num_turns=700, seed=seed), num_replicas=3, num_blocks=4000)
    best, by_load, by_cache = outcomes.values()
    assert by_cache.cached >= 0.95 * best.cached
    assert by_cache.load_imbalance <= 1.3
    assert by_cache.work_imbalance <= 1.3
    assert by_load.cached < 0.9 * best.cached, "otherwise this shows nothing"
