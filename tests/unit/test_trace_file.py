"""Recorded rounds as Chrome trace events."""

import json
import random
from typing import Any

from echelon.cli.trace_file import align, chrome_trace
from echelon.pb.scheduler_pb2 import TracedMove, TracedRound, TracedWait, TraceEvent
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, MoveOrder, Span

TARGET, DRAFT = ENGINE_ROLE_TARGET, ENGINE_ROLE_DRAFT


def traced(engine: Any, round_id: int, sent_us: int, received_us: int, **fields: Any) -> TraceEvent:
    defaults = {"group": "target" if engine == TARGET else "draft", "run_ns": (received_us - sent_us) * 1000}
    times = {"sent_ns": sent_us * 1000, "received_ns": received_us * 1000}
    return TraceEvent(round=TracedRound(engine=engine, round_id=round_id, **{**times, **defaults, **fields}))


def events_of(*events: TraceEvent) -> list[dict[str, Any]]:
    document = json.loads(json.dumps(chrome_trace(events)))
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def lane_names(events: list[dict[str, Any]]) -> dict[tuple[int, int | None], str]:
    """The names of processes by (pid, None), and of threads by (pid, tid)."""
    return {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event["name"] in ("process_name", "thread_name")
    }


def test_every_rank_has_its_lane() -> None:
    spans = [
        Span(rank=0, name="verify", start_ns=1_500, run_ns=20_000),
        Span(rank=1, name="wait", start_ns=2_000, run_ns=3_000),
    ]
    events = events_of(
        traced(TARGET, 1, 100, 200, queue_ns=10_000, run_ns=70_000, spans=spans),
        traced(DRAFT, 4, 150, 250, spans=[Span(rank=0, name="draft", run_ns=100_000)]),
        TraceEvent(wait=TracedWait(engine=TARGET, start_ns=20_000, run_ns=80_000)),
    )
    names = lane_names(events)
    complete = {
        (names[e["pid"], None], names[e["pid"], e["tid"]], e["name"]): (e["ts"], e["dur"])
        for e in events
        if e["ph"] == "X"
    }
    assert complete == {
        ("scheduler", "target rounds", "target round"): (100.0, 100.0),
        ("scheduler", "target rounds", "wait"): (20.0, 80.0),
        ("scheduler", "draft rounds", "draft round"): (150.0, 100.0),
        ("target group", "rank 0", "verify"): (121.5, 20.0),  # the round began between 110 and 130
        ("target group", "rank 1", "wait"): (122.0, 3.0),
        ("draft group", "rank 0", "draft"): (150.0, 100.0),
    }
    assert all(event["ph"] in ("X", "M") for event in events)


def test_rounds_in_flight_at_once_do_not_share_a_lane() -> None:
    events = events_of(*(traced(TARGET, i, 10 * i, 10 * i + 15, run_ns=8_000) for i in range(4)))
    names = lane_names(events)
    lanes = [names[e["pid"], e["tid"]] for e in events if e["ph"] == "X"]
    assert sorted(lanes) == ["target rounds", "target rounds", "target rounds, 2", "target rounds, 2"]


def test_a_colocated_draft_is_in_the_targets_lane() -> None:
    spans = [Span(rank=0, name="draft", run_ns=10)]
    events = events_of(traced(TARGET, 1, 0, 100, spans=spans), traced(DRAFT, 1, 100, 200, group="target", spans=spans))
    assert {e["pid"] for e in events if e["name"] == "draft" and e["ph"] == "X"} == {2}
    assert "draft group" not in lane_names(events).values()


def test_aligned_rounds_are_possible_and_never_overlap() -> None:
    """Whatever the delays: each round lies between sending and answer, and rounds come one after the other."""
    rng = random.Random(1)
    for _ in range(200):
        rounds: list[TracedRound] = []
        truths: list[int] = []
        free = sent = received = 0
        for _ in range(8):
            sent += rng.randrange(50)
            arrived = sent + rng.randrange(100)
            began = max(free, arrived)
            run = rng.randrange(1, 80)
            free = began + run
            received = max(received, free + rng.randrange(100))
            truths.append(began)
            rounds.append(TracedRound(sent_ns=sent, received_ns=received, queue_ns=began - arrived, run_ns=run))
        aligned = align(rounds)
        end = 0
        for traced_round, began in zip(rounds, aligned, strict=True):
            assert traced_round.sent_ns <= began
            assert began + traced_round.run_ns <= traced_round.received_ns
            assert began >= end
            end = began + traced_round.run_ns
        assert max(abs(a - b) for a, b in zip(aligned, truths, strict=True)) <= 200


def test_a_round_begins_in_the_middle_of_what_is_possible() -> None:
    assert align([TracedRound(sent_ns=100, queue_ns=20, run_ns=50, received_ns=200)]) == [135]


def test_moves_have_lanes_of_their_own() -> None:
    """One for each engine and kind, more where moves overlap; and one for each rank."""

    def move(engine: Any, kind: Any, sent_us: int, received_us: int, *rank_run_us: int) -> TraceEvent:
        return TraceEvent(
            move=TracedMove(
                engine=engine,
                group="target",
                kind=kind,
                sent_ns=1000 * sent_us,
                received_ns=1000 * received_us,
                num_blocks=3,
                rank_run_ns=[1000 * run_us for run_us in rank_run_us],
            )
        )

    events = events_of(
        move(TARGET, MoveOrder.STORE, 10, 50, 20, 30),
        move(TARGET, MoveOrder.STORE, 20, 90, 40, 10),
        move(DRAFT, MoveOrder.LOAD, 30, 60, 100),  # a clock that is wrong
    )
    names = lane_names(events)
    lanes = {
        (names[e["pid"], None], names[e["pid"], e["tid"]], e["name"]): (e["ts"], e["dur"])
        for e in events
        if e["ph"] == "X"
    }
    assert lanes == {
        ("scheduler", "target stores", "store"): (10.0, 40.0),
        ("scheduler", "target stores, 2", "store"): (20.0, 70.0),
        ("scheduler", "draft loads", "load"): (30.0, 30.0),
        ("target group", "rank 0, target stores", "store"): (50.0, 40.0),
        ("target group", "rank 1, target stores", "store"): (80.0, 10.0),
        ("target group", "rank 0, draft loads", "load"): (30.0, 30.0),
    }
