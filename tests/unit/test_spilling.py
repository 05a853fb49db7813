"""Seqs that are longer than the device: their older blocks stay in host memory, and no stream's tokens change."""

import random
from typing import Any

import pytest

from echelon.pb import scheduler_pb2, worker_pb2
from scheduler.config import Method, Pipeline
from tests.helpers.fake_group import FakeEngine
from tests.helpers.fake_tiers import LOAD, READ, FakeTiers
from tests.helpers.scheduler_sim import Simulation, submit

BLOCK = 4
NUM_BLOCKS = 8
ROOM = BLOCK * NUM_BLOCKS  # tokens on the device
NUM_SLOTS = 64
MAX_LEN = BLOCK * NUM_SLOTS


def small_device(
    *,
    attention: str = "budgeted",
    num_slots: int = NUM_SLOTS,
    num_disk_blocks: int = 0,
    draft: bool = False,
    **config: Any,
) -> Simulation:
    def engine(role: "worker_pb2.EngineRole.ValueType") -> FakeEngine:
        return FakeEngine(
            role=role,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK,
            max_model_len=MAX_LEN,
            tiers=FakeTiers(num_slots=num_slots, num_disk_blocks=num_disk_blocks),
            attention=attention,
        )

    target = engine(worker_pb2.ENGINE_ROLE_TARGET)
    sim = Simulation(target=target, draft=engine(worker_pb2.ENGINE_ROLE_DRAFT) if draft else None, **config)
    for each in (sim.target, sim.draft):
        if each is not None and each.tiers is not None:
            sim.core.tiers_of(each.role).on_disk_contents(each.tiers.contents())
    return sim


def long_prompt(seed: int, num_tokens: int = 4 * ROOM) -> list[int]:
    return random.Random(seed).choices(range(30), k=num_tokens)


def ask(request_id: str, token_ids: list[int], **fields: Any) -> scheduler_pb2.Submit:
    message: scheduler_pb2.Submit = submit(request_id, token_ids, attention="budgeted", **fields)
    return message


def assert_nothing_is_held(sim: Simulation) -> None:
    """Every block and every host slot can be taken."""
    sim.assert_all_free()
    host = sim.core.tiers_of(sim.target.role).host
    taken = [host.reserve(bytes([number])) for number in range(host.num_slots)]
    assert len({block.slot for block in taken if block is not None}) == host.num_slots


def test_a_seq_of_several_times_the_devices_blocks_is_served_exactly() -> None:
    sim = small_device()
    message = ask("long", long_prompt(1), max_tokens=24)
    sim.submit(message)
    sim.run()
    sim.assert_plain(message)
    assert len(sim.tokens["long", 0]) == 24
    assert LOAD not in sim.target.tiers.num_moved
    assert sim.core.status().num_preemptions_total == 0
    assert_nothing_is_held(sim)


def test_its_next_turn_begins_in_host_memory() -> None:
    sim = small_device()
    sim.submit(ask("first", long_prompt(1), max_tokens=4))
    sim.run()
    computed = sim.target.num_tokens
    again = ask("again", long_prompt(1), max_tokens=4)
    sim.submit(again)
    sim.run()
    sim.assert_plain(again)
    usage = sim.completed["again"].usage
    assert usage.cached_prompt_tokens == usage.cached_prompt_tokens_from_host == 4 * ROOM - BLOCK
    assert sim.target.num_tokens - computed < 3 * BLOCK
    assert_nothing_is_held(sim)


def test_a_seq_that_fits_the_device_stays_there() -> None:
    sim = small_device()
    message = ask("short", long_prompt(1, ROOM // 2), max_tokens=8)
    sim.submit(message)
    while sim.step():
        assert all(not slot.num_in_host for slot in sim.target.slots.values() if slot is not None)
    sim.assert_plain(message)


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not deployed": (
        {"attention": "full"},
        {},
        "attention.mode must be full here: budgeted needs `attention: budgeted`",
    ),
    "unknown": ({}, {"attention": "sparse"}, "attention.mode must be one of full, budgeted, got 'sparse'"),
    "longer than host memory": (
        {"num_slots": 20},
        {},
        "host memory has room for 80: shorten the prompt, or raise kv_cache",
    ),
    "not asked for": (
        {},
        {"attention": "full"},
        "the devices have room for 32: shorten the prompt, or set attention.mode",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_is_refused_by_the_field_that_must_change(name: str) -> None:
    settings, fields, message = REFUSALS[name]
    sim = small_device(**settings)
    sim.submit(submit("refused", long_prompt(1), **{"attention": "budgeted"} | fields))
    assert message in sim.failed["refused"].message
    assert_nothing_is_held(sim)


def test_seqs_that_host_memory_cannot_hold_together_run_one_after_another() -> None:
    sim = small_device(num_slots=48)
    messages = [ask(f"long {seed}", long_prompt(seed), max_tokens=8) for seed in range(3)]
    for message in messages:
        sim.submit(message)
    sim.run()
    for message in messages:
        sim.assert_plain(message)
    assert_nothing_is_held(sim)


def test_a_lost_target_computes_the_seq_again() -> None:
    sim = small_device(keeps_requests=True)
    message = ask("long", long_prompt(1), max_tokens=24)
    sim.submit(message)
    while len(sim.tokens.get(("long", 0), [])) < 10:
        assert sim.step()
    sim.lose_target()
    sim.return_target()
    sim.core.tiers_of(sim.target.role).on_disk_contents(sim.target.tiers.contents())
    sim.run()
    sim.assert_plain(message)
    assert len(sim.tokens["long", 0]) == 24
    assert_nothing_is_held(sim)


SPECULATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "lookup": {"speculation": {"method": Method.SUFFIX}},
    "serial": {"draft": True, "speculation": {"pipeline": Pipeline.SERIAL}},
    "continuous": {"draft": True, "speculation": {"pipeline": Pipeline.CONTINUOUS}},
}


@pytest.mark.parametrize("name", SPECULATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_events_leaves_streams_as_they_are_and_nothing_held(name: str, seed: int) -> None:
    """Long and short seqs, samples, aborts, moves that fail, and a disk into which host memory overflows."""
    rng = random.Random(seed)
    sim = small_device(num_disk_blocks=rng.choice([0, 200]), **SPECULATIONS[name])
    messages = []
    for number in range(10):
        length = rng.choice([5, ROOM - 12, ROOM - 4, 2 * ROOM, 3 * ROOM])
        start = rng.randrange(3)  # prompts share prefixes
        prompt = long_prompt(start, length)
        messages.append(ask(str(number), prompt, max_tokens=rng.randrange(1, 20), n=rng.choice([1, 1, 2])))
    waiting = list(messages)
    while True:
        if waiting and rng.random() < 0.1:
            sim.submit(waiting.pop())
        if rng.random() < 0.02:
            sim.cancel(str(rng.randrange(10)))
        if sim.moves and rng.random() < 0.1:
            ready = sim.ready_moves()
            if ready:
                index = rng.choice(ready)
                is_copy = sim.moves[index][1].kind != READ
                sim.run_move(index, [0] if is_copy and rng.random() < 0.3 else [])
        if not sim.step(rng) and not waiting:
            break
    assert sim.core.num_requests == 0
    for message in messages:
        for index in range(message.sampling.n):
            sim.assert_plain(message, index)
    assert_nothing_is_held(sim)
