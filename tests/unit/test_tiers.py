"""KV moves between device, host memory and disk, and no stream's tokens change."""

import random
from typing import Any

import pytest

from childproc.block_digests import DigestChain, root_digest
from echelon.pb import worker_pb2
from scheduler.config import Pipeline, TierConfig
from scheduler.kv_cache.contents import CacheContents
from scheduler.kv_cache.disk import DiskTier
from tests.helpers.fake_group import FakeEngine, FakeModel, plain_tokens
from tests.helpers.fake_tiers import LOAD, READ, STORE, WRITE, FakeTiers
from tests.helpers.scheduler_sim import Simulation, seq_sampling, submit

BLOCK = 4
PIPELINES: list[dict[str, Any]] = [
    {"pipeline": Pipeline.SERIAL},
    {"pipeline": Pipeline.SERIAL, "adaptive": True},
    {"pipeline": Pipeline.CONTINUOUS},
    {"pipeline": Pipeline.CONTINUOUS, "verdict_cache_rows": 6},
]


def tiered(
    num_blocks: int = 16,
    num_slots: int = 64,
    num_disk_blocks: int = 0,
    *,
    draft: bool = False,
    tier_dtype: str = "same",
    **config: Any,
) -> Simulation:
    def engine(role: "worker_pb2.EngineRole.ValueType") -> FakeEngine:
        tiers = FakeTiers(num_slots=num_slots, num_disk_blocks=num_disk_blocks)
        return FakeEngine(
            role=role,
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_model_len=BLOCK * num_blocks,
            tiers=tiers,
            tier_dtype=tier_dtype,
        )

    target = engine(worker_pb2.ENGINE_ROLE_TARGET)
    sim = Simulation(target=target, draft=engine(worker_pb2.ENGINE_ROLE_DRAFT) if draft else None, **config)
    list_disks(sim)
    return sim


def list_disks(sim: Simulation) -> None:
    for each in (sim.target, sim.draft):
        if each is not None and each.tiers is not None:
            sim.core.tiers_of(each.role).on_disk_contents(each.tiers.contents())


def assert_nothing_is_pinned(sim: Simulation) -> None:
    """Every host slot can be taken by a new block."""
    for each in (sim.target, sim.draft):
        if each is not None:
            host = sim.core.tiers_of(each.role).host
            taken = [host.reserve(bytes([number])) for number in range(host.num_slots)]
            assert len({block.slot for block in taken if block is not None}) == host.num_slots


def prompt(seed: int, num_tokens: int = 40) -> list[int]:
    return random.Random(seed).choices(range(30), k=num_tokens)


def ask(sim: Simulation, request_id: str, token_ids: list[int], **fields: Any) -> Any:
    message = submit(request_id, token_ids, max_tokens=4, **fields)
    sim.submit(message)
    sim.run()
    sim.assert_plain(message)
    return sim.completed[request_id].usage


def flood(sim: Simulation, *seeds: int) -> None:
    """Other requests push everything out of the device."""
    for seed in seeds:
        ask(sim, f"flood-{seed}", prompt(1000 + seed, 56))


@pytest.mark.parametrize("draft", [False, True])
def test_a_prefix_that_left_the_device_comes_back_from_host_memory(draft: bool) -> None:
    sim = tiered(draft=draft)
    ask(sim, "first", prompt(1))
    flood(sim, 1, 2)
    computed = sim.target.num_tokens
    usage = ask(sim, "again", prompt(1))
    assert usage.cached_prompt_tokens == usage.cached_prompt_tokens_from_host == 36
    assert sim.target.num_tokens - computed < 2 * BLOCK + 10
    for engine in (sim.target, sim.draft):
        if engine is not None:
            assert engine.tiers.num_moved[LOAD] == 9
    sim.assert_all_free()
    assert_nothing_is_pinned(sim)


ON_EVICT = TierConfig(stores_on_evict=True)


@pytest.mark.parametrize("draft", [False, True])
def test_blocks_are_stored_only_when_the_device_runs_out_of_room(draft: bool) -> None:
    """Then a prefix and its draft's half come back as if they had been stored at once."""
    sim = tiered(num_blocks=64, draft=draft, max_num_batched_tokens=64, tiers=ON_EVICT)
    engines = [engine for engine in (sim.target, sim.draft) if engine is not None]
    ask(sim, "first", prompt(1))
    flood(sim, 1)
    assert all(STORE not in engine.tiers.num_moved for engine in engines)
    flood(sim, *range(2, 8))
    usage = ask(sim, "again", prompt(1))
    assert usage.cached_prompt_tokens == usage.cached_prompt_tokens_from_host == 36
    for engine in engines:
        assert engine.tiers.num_moved[LOAD] == 9
    sim.assert_all_free()
    assert_nothing_is_pinned(sim)


def test_what_is_used_again_and_again_is_never_stored_on_eviction() -> None:
    sim = tiered(num_blocks=64, max_num_batched_tokens=64, tiers=ON_EVICT)
    ask(sim, "first", prompt(1))
    for seed in range(12):
        flood(sim, seed)
        assert ask(sim, f"chat {seed}", prompt(1)).cached_prompt_tokens == 36
    assert sim.target.tiers.num_moved[STORE] > 100
    chain = DigestChain(root_digest("fake", BLOCK), BLOCK).extend(prompt(1), 9)
    host = sim.core.tiers_of(sim.target.role).host
    assert [host.get(digest) for digest in chain] == [None] * 9
    flood(sim, *range(20, 26))
    assert None not in [host.get(digest) for digest in chain]


def test_a_preempted_seq_comes_back_from_host_memory_that_it_reached_by_eviction() -> None:
    sim = tiered(num_blocks=20, max_num_batched_tokens=16, tiers=ON_EVICT)
    messages = [submit(f"long {seed}", prompt(seed, 36), max_tokens=24) for seed in range(3)]
    for message in messages:
        sim.submit(message)
    sim.run()
    for message in messages:
        sim.assert_plain(message)
    assert sim.core.status().num_preemptions_total > 0
    assert sim.target.tiers.num_moved[LOAD] > 0
    sim.assert_all_free()
    assert_nothing_is_pinned(sim)


def test_a_host_tier_smaller_than_what_the_device_evicts_is_filled_once_and_not_forever() -> None:
    sim = tiered(num_blocks=64, num_slots=4, max_num_batched_tokens=64, tiers=ON_EVICT)
    flood(sim, *range(8))
    num_stored = sim.target.tiers.num_moved[STORE]
    for _ in range(3):
        sim.plan()
        assert not sim.moves
    assert num_stored <= 8 * 14


def test_at_the_end_the_device_too_goes_to_disk() -> None:
    sim = tiered(num_blocks=64, num_disk_blocks=200, max_num_batched_tokens=64, tiers=ON_EVICT)
    ask(sim, "first", prompt(1))
    tiers = sim.core.tiers_of(sim.target.role)
    assert not sim.target.tiers.disk
    tiers.write_all()
    while not tiers.has_written(sim.now):
        assert sim.step()
    restarted = tiered(num_blocks=64, num_disk_blocks=200)
    restarted.target.tiers.disk = sim.target.tiers.disk
    list_disks(restarted)
    assert ask(restarted, "again", prompt(1)).cached_prompt_tokens_from_disk == 36


def test_a_prefix_that_left_host_memory_comes_back_from_disk_after_a_restart() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=200)
    ask(sim, "first", prompt(1))
    flood(sim, *range(4))
    usage = ask(sim, "again", prompt(1))
    assert usage.cached_prompt_tokens_from_disk == 36
    restarted = tiered(num_slots=24, num_disk_blocks=200)
    restarted.target.tiers.disk = sim.target.tiers.disk
    list_disks(restarted)
    usage = ask(restarted, "again", prompt(1))
    assert usage.cached_prompt_tokens_from_disk == 36


def test_a_target_that_returns_is_asked_for_its_disk_before_prompts_are_computed_again() -> None:
    """It says what it has a moment after it is there."""
    sim = tiered(num_slots=24, num_disk_blocks=200, keeps_requests=True, tiers=TierConfig(writes_at_once=True))
    ask(sim, "first", prompt(1))
    sim.lose_target()
    message = submit("again", prompt(1), max_tokens=4)
    sim.submit(message)
    sim.return_target()
    sim.plan()
    assert not sim.target_rounds
    list_disks(sim)
    sim.run()
    sim.assert_plain(message)
    assert sim.completed["again"].usage.cached_prompt_tokens_from_disk == 36


def test_a_disk_that_never_says_what_it_has_delays_the_first_prompt_only() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=200, keeps_requests=True, tiers=TierConfig(load_timeout_s=2.0))
    sim.lose_target()
    sim.submit(submit("patient", prompt(1), max_tokens=4))
    sim.return_target()
    started_s = sim.now
    sim.run()
    assert sim.first_token_at["patient"] == started_s + 2.0
    ask(sim, "later", prompt(2))
    assert sim.first_token_at["later"] == started_s + 2.0


def test_requests_of_different_salts_share_no_prefix_in_any_tier() -> None:
    """On the device, in host memory and on disk."""
    sim = tiered(num_slots=24, num_disk_blocks=200, tiers=TierConfig(writes_at_once=True))
    ask(sim, "first", prompt(1), cache_salt="a")
    assert ask(sim, "other", prompt(1), cache_salt="b").cached_prompt_tokens == 0
    assert ask(sim, "none", prompt(1)).cached_prompt_tokens == 0
    flood(sim, *range(4))
    usage = ask(sim, "later", prompt(1), cache_salt="c")
    assert usage.cached_prompt_tokens == 0
    usage = ask(sim, "again", prompt(1), cache_salt="a")
    assert usage.cached_prompt_tokens == usage.cached_prompt_tokens_from_disk == 36
    assert ask(sim, "at once", prompt(1), cache_salt="a").cached_prompt_tokens == 36


def test_a_request_that_begins_with_rounded_blocks_says_so() -> None:
    """They may have come back for another one, and what was computed after them depends on them."""
    sim = tiered(tier_dtype="int8")
    rounded = ["kv_cache.tier_dtype: int8"]
    assert ask(sim, "first", prompt(1)).approximations == []
    assert ask(sim, "from the device", prompt(1)).approximations == []
    flood(sim, 1, 2)
    again = ask(sim, "again", prompt(1))
    assert (again.cached_prompt_tokens_from_host, again.approximations) == (36, rounded)
    after = ask(sim, "after", prompt(1))
    assert (after.cached_prompt_tokens_from_host, after.approximations) == (0, rounded)
    assert ask(sim, "salted", prompt(1), cache_salt="a").approximations == []
    longer = [*prompt(1), *prompt(2, 12)]
    usage = ask(sim, "longer", longer)
    assert (usage.cached_prompt_tokens, usage.approximations) == (40, rounded)
    assert ask(sim, "no rounded block any more", prompt(3)).approximations == []


@pytest.mark.parametrize(("tier_dtype", "expected"), [("same", []), ("int8", ["kv_cache.tier_dtype: int8"])])
def test_a_request_that_goes_on_elsewhere_may_have_begun_with_rounded_blocks(
    tier_dtype: str, expected: list[str]
) -> None:
    """The scheduler that knew was lost."""
    sim = tiered(tier_dtype=tier_dtype)
    message = submit("resumed", prompt(1), max_tokens=4)
    sim.submit(message)
    while not sim.tokens.get(("resumed", 0)):
        sim.step()
    sim.lose_scheduler()
    sim.run()
    sim.assert_plain(message)
    assert sim.completed["resumed"].usage.approximations == expected


def test_the_status_reports_what_each_tier_holds_and_did() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=50, draft=True)
    ask(sim, "first", prompt(1))
    flood(sim, *range(4))
    usages = [ask(sim, "from disk", prompt(1)), ask(sim, "from the device", prompt(1))]
    flood(sim, 4)
    usages.append(ask(sim, "from everywhere", prompt(1)))
    flood(sim, *range(5, 8))
    status = sim.core.status()
    assert status.prefix_cache_queries == 4 * 40 + 8 * 56
    assert status.prefix_cache_hits == 3 * 36
    assert status.prefix_cache_hits_from_host == sum(usage.cached_prompt_tokens_from_host for usage in usages) > 0
    assert status.prefix_cache_hits_from_disk == sum(usage.cached_prompt_tokens_from_disk for usage in usages) > 0
    tiers = {(tier.engine, tier.tier): tier for tier in status.tiers}
    assert list(tiers) == [
        (role, name)
        for role in (worker_pb2.ENGINE_ROLE_TARGET, worker_pb2.ENGINE_ROLE_DRAFT)
        for name in ("host", "disk")
    ]
    host, disk = (tiers[worker_pb2.ENGINE_ROLE_TARGET, name] for name in ("host", "disk"))
    moved = sim.target.tiers.num_moved
    assert (host.num_blocks, host.stored_blocks_total, host.fetched_blocks_total) == (24, moved[STORE], moved[LOAD])
    assert (disk.num_blocks, disk.stored_blocks_total, disk.fetched_blocks_total) == (50, moved[WRITE], moved[READ])
    assert (disk.num_used_blocks, disk.evicted_blocks_total) == (50, moved[WRITE] - 50)
    assert disk.fetch_seconds_total > 0


def test_the_status_tells_what_fetched_prefixes_saved_and_what_was_damaged() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=200)
    ask(sim, "first", prompt(1))
    flood(sim, *range(4))
    sim.submit(submit("again", prompt(1), max_tokens=1))
    while sim.core.num_requests or sim.moves:
        sim.plan()
        for index in sim.ready_moves()[:1]:
            sim.now += 0.25 if sim.moves[index][1].kind in (READ, LOAD) else 0.0
            sim.run_move(index)
        if sim.target_rounds and not sim.moves:
            sim.run_target_round()
    host, disk = sim.core.status().tiers
    blocks_s = sim.core.engines[sim.target.role].cost.seconds(36, 64)
    assert disk.avoided_seconds_total == pytest.approx(blocks_s)
    assert disk.waited_seconds_total == pytest.approx(0.5), "a read, then a load"
    assert (host.avoided_seconds_total, host.waited_seconds_total) == (0.0, 0.0)
    assert disk.fetch_queue_seconds_total == pytest.approx(0.25 - 0.001)
    assert host.fetch_queue_seconds_total == pytest.approx(0.25 - 0.001)
    tiers = sim.core.tiers_of(sim.target.role)
    order = tiers.moves.order(READ, sim.now, lambda failed, now: None, host_slots=[0, 1], digests=[b"a", b"b"])
    tiers.on_moved(worker_pb2.MoveResult(move_id=order.move_id, failed=[0, 1], num_damaged=1), sim.now)
    disk = sim.core.status().tiers[1]
    assert (disk.damaged_blocks_total, disk.failed_blocks_total) == (1, 2)


def test_no_tier_keeps_what_a_broken_seq_computed() -> None:
    message = submit("bad", prompt(1))
    bad = plain_tokens(prompt(1), seq_sampling(message), 5)
    sim = tiered(num_slots=200, num_disk_blocks=200, tiers=TierConfig(writes_at_once=True))
    sim.target.model = FakeModel(bad_prefix=tuple(bad[3:5]))
    sim.submit(message)
    sim.run()
    assert "bad" in sim.failed
    flood(sim, 1, 2)
    assert sim.target.tiers.disk, "the others are kept"
    sim.submit(submit("again", prompt(1), max_tokens=1))
    sim.run()
    assert sim.completed["again"].usage.cached_prompt_tokens == 0


def test_host_memory_is_written_to_disk_before_the_end() -> None:
    sim = tiered(num_disk_blocks=200)
    ask(sim, "first", prompt(1))
    assert not sim.target.tiers.disk, "nobody has asked for it again"
    tiers = sim.core.tiers_of(sim.target.role)
    tiers.write_all()
    assert not tiers.has_written(sim.now)
    sim.run()
    assert tiers.has_written(sim.now)
    assert len(sim.target.tiers.disk) == 10


def test_a_hanging_disk_delays_a_seq_until_its_deadline_and_nobody_else() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=200)
    ask(sim, "first", prompt(1))
    flood(sim, *range(4))
    stuck = submit("stuck", prompt(1), max_tokens=4)
    sim.submit(stuck)
    sim.plan()
    reads = [move for move in sim.moves if move[1].kind == READ]
    assert reads, "the prefix is on disk"
    sim.moves = [move for move in sim.moves if move[1].kind != READ]  # never answered
    began_s = sim.now
    other = submit("other", prompt(7, 12), max_tokens=4)
    sim.submit(other)
    sim.run()
    assert sim.ended_at["other"] == began_s
    assert sim.ended_at["stuck"] == pytest.approx(began_s + 2.0)
    sim.assert_plain(stuck)
    sim.assert_plain(other)
    assert sim.completed["stuck"].usage.cached_prompt_tokens == 0


def test_a_disk_with_errors_is_left_alone_and_tried_again() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=200, tiers=TierConfig(writes_at_once=True))
    disk = sim.core.tiers_of(sim.target.role).disk
    while not disk.is_failing:
        sim.submit(submit(f"r{sim.core.status().prompt_tokens_total}", prompt(sim.target.num_rounds), max_tokens=1))
        while sim.core.num_requests or sim.moves:
            sim.plan()
            writes = [index for index in sim.ready_moves() if sim.moves[index][1].kind == WRITE]
            if writes:
                sim.run_move(writes[0], fails=[0], error="no space left on device")
            else:
                sim.step()
    assert sim.core.status().tiers[1].paused
    paused_s = sim.now
    meanwhile = submit("meanwhile", prompt(77), max_tokens=4)
    sim.submit(meanwhile)
    while sim.core.num_requests:
        assert sim.step()
    sim.assert_plain(meanwhile)
    assert not any(order.kind == WRITE for _, order, _ in sim.moves)
    sim.run()
    assert sim.now == paused_s + 30.0, (
        "the blocks that could not be written are tried again, though nothing else happens"
    )
    assert not disk.is_failing
    assert sim.target.tiers.num_moved[WRITE] > 0


def test_moves_that_fail_together_make_one_pause_of_30_seconds_then_one_of_60() -> None:
    disk = DiskTier(1, CacheContents())
    disk.announce((), is_last=True)
    for now, pause_s in ((0.0, 30.0), (30.0, 60.0), (90.0, 120.0)):
        for _ in range(10):
            disk.failed(disk.writes, "Input/output error", now)
        assert not disk.may(disk.writes, now + pause_s - 0.1)
        assert disk.may(disk.writes, now + pause_s)
        assert disk.may(disk.reads, now), "a full disk can be read"


def test_a_draft_gets_evicted_blocks_back_even_if_the_target_kept_its_own() -> None:
    sim = tiered(num_blocks=64, draft=True)
    assert sim.draft is not None
    sim.draft.num_blocks = 16
    sim.reconnect_draft()
    ask(sim, "first", prompt(1))
    flood(sim, 1, 2)
    usage = ask(sim, "again", prompt(1))
    assert (usage.cached_prompt_tokens, usage.cached_prompt_tokens_from_host) == (36, 0)
    assert sim.draft.tiers is not None
    assert sim.draft.tiers.num_moved[LOAD] == 9


def test_a_seq_that_grows_takes_blocks_that_were_fetched_for_waiting_ones() -> None:
    """Otherwise it would make room by leaving, with nobody else to run."""
    sim = tiered()
    ask(sim, "first", prompt(1, 32))
    flood(sim, 1, 2)
    growing, waiting = submit("growing", prompt(2, 20), max_tokens=40), submit("waiting", prompt(1, 32), max_tokens=4)
    sim.submit(growing)
    sim.plan()
    sim.submit(waiting)
    while sim.core.status().num_free_blocks:
        sim.run_target_round()
        sim.plan()
    load = next(index for index, move in enumerate(sim.moves) if move[1].kind == LOAD)
    assert sim.core.status().num_requests_running == 1
    sim.run_move(load)
    sim.run()
    sim.assert_plain(growing)
    sim.assert_plain(waiting)
    assert sim.core.status().num_preemptions_total == 0


def test_writes_that_fail_without_a_reason_are_not_repeated_for_ever() -> None:
    sim = tiered(num_slots=24, num_disk_blocks=200, tiers=TierConfig(writes_at_once=True))
    sim.submit(submit("first", prompt(1), max_tokens=1))
    for _ in range(100):
        sim.plan()
        if not (sim.target_rounds or sim.moves):
            break
        if sim.target_rounds:
            sim.run_target_round()
        else:
            failing = range(len(sim.moves[0][1].host_slots)) if sim.moves[0][1].kind == WRITE else ()
            sim.run_move(0, fails=list(failing))
    assert not sim.moves
    assert sim.core.status().tiers[1].last_error == "some blocks were not written"


def test_each_block_is_stored_once() -> None:
    sim = tiered()
    for number in range(4):
        ask(sim, f"r{number}", prompt(1))
    assert sim.target.tiers.num_moved[STORE] == 10  # 40 prompt tokens, and 4 outputs of which the last has no KV


def test_a_device_that_one_prompt_fills_loses_no_block_to_the_next_one() -> None:
    """Stores are done before the rounds that were sent after them, as copies are that a round waits for."""
    sim = tiered(num_slots=160)
    for number in range(6):
        sim.submit(submit(f"r{number}", prompt(number, 56), max_tokens=1))
    while sim.core.num_requests:
        sim.plan()
        moves = sim.ready_moves()
        sim.run_move(moves[0]) if moves else sim.run_target_round()
    sim.run()
    assert sim.target.num_rounds == 6, "a prompt waits for the stores of the one before, and is then computed at once"
    for number in range(6):
        usage = ask(sim, f"again {number}", prompt(number, 56))
        assert usage.cached_prompt_tokens == 52


def random_engine(rng: random.Random, role: "worker_pb2.EngineRole.ValueType") -> FakeEngine:
    return FakeEngine(
        role=role,
        model=FakeModel(foresight=rng.choice([0, 50, 90, 100]))
        if role == worker_pb2.ENGINE_ROLE_DRAFT
        else FakeModel(),
        num_blocks=rng.choice([16, 24, 40]),
        block_size=BLOCK,
        num_slots=rng.choice([2, 8]),
        max_model_len=64,
        lp_size=rng.choice([1, 4]) if role == worker_pb2.ENGINE_ROLE_DRAFT else 1,
        tiers=FakeTiers(num_slots=rng.choice([1, 8, 32, 100]), num_disk_blocks=rng.choice([0, 10, 200])),
    )


def random_simulation(rng: random.Random, speculation: dict[str, Any]) -> Simulation:
    has_draft = rng.random() < 0.7
    sim = Simulation(
        target=random_engine(rng, worker_pb2.ENGINE_ROLE_TARGET),
        draft=random_engine(rng, worker_pb2.ENGINE_ROLE_DRAFT) if has_draft else None,
        k=rng.randint(1, 6),
        speculation=speculation if has_draft else None,
        max_num_batched_tokens=rng.choice([8, 16, 64]),
        max_rounds_in_flight=rng.choice([1, 2]),
        tiers=TierConfig(stores_on_evict=rng.random() < 0.4, writes_at_once=rng.random() < 0.5, load_timeout_s=0.05),
        keeps_requests=True,
    )
    list_disks(sim)
    return sim


def random_submit(rng: random.Random, number: int) -> Any:
    shared = prompt(rng.randrange(3), 40)
    fields: dict[str, Any] = {"seed": rng.randrange(3), "max_tokens": rng.randint(1, 12), "n": rng.choice([1, 1, 3])}
    if rng.random() < 0.1:
        fields["prompt_logprobs"] = 1
    return submit(f"r{number}", shared[: rng.randint(1, 40)] + prompt(number, rng.randint(1, 8)), **fields)


def random_move(sim: Simulation, rng: random.Random) -> None:
    """One of the moves in flight ends; now and then some of its blocks do not arrive."""
    index = rng.choice(sim.ready_moves())
    order = sim.moves[index][1]
    num_blocks = max(len(order.host_slots), len(order.digests))
    fails = [i for i in range(num_blocks) if rng.random() < 0.3] if rng.random() < 0.1 else []
    sim.run_move(index, fails, "EIO" if fails and rng.random() < 0.5 else "")


@pytest.mark.parametrize("speculation", PIPELINES, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving_of_moves_rounds_aborts_and_failures_gives_the_plain_streams(
    seed: int, speculation: dict[str, Any]
) -> None:
    rng = random.Random(seed)
    sim = random_simulation(rng, speculation)
    messages = [random_submit(rng, number) for number in range(20)]
    waiting = list(messages)
    while waiting or sim.core.num_requests:
        if waiting and rng.random() < 0.3:
            sim.submit(waiting.pop())
        if rng.random() < 0.02:
            sim.cancel(rng.choice(messages).request_id)
        if sim.draft and rng.random() < 0.01:
            sim.reconnect_draft()
            list_disks(sim)
        if rng.random() < 0.01:
            sim.lose_target()
            sim.return_target()
            list_disks(sim)
        if rng.random() < 0.05:
            sim.now += 0.02
        sim.plan()
        assert sim.is_awaited, "nothing will let it plan again"
        if sim.ready_moves() and rng.random() < 0.3:
            random_move(sim, rng)
        elif sim.draft_rounds or sim.target_rounds:
            assert sim.step(rng)
        elif not waiting:
            assert sim.step(rng) or not sim.core.num_requests, "stuck"
    while sim.moves or sim.draft_rounds:
        assert sim.step(rng)
    for message in messages:
        for index in range(message.sampling.n):
            sim.assert_plain(message, index)
    sim.assert_all_free()
    assert_nothing_is_pinned(sim)
