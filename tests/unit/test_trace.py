"""The spans of rounds that ask for them."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from echelon.pb.worker_pb2 import EngineInfo, EngineRole, LayerGroup, Round, RoundResult, Row, Span
from tests.helpers.engines import DRAFT, TARGET, drive, make_engine
from tests.helpers.rounds import Driver, greedy
from tests.helpers.tiny_models import make_tiny_model
from workers.collectives import SoloGroup
from workers.process.cohort import Cohort
from workers.process.round_channel import Follower, Leader
from workers.process.run_loop import Arrived, Opened, RunLoop, Stop, follow
from workers.trace import TracedGroup, Tracer

PROMPT = [5, 99, 3, 14, 15]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny")).folder


class Traced:
    """An engine whose rounds are all traced."""

    def __init__(self, folder: Path, role: EngineRole.ValueType, **changes: object) -> None:
        cohort = Cohort(0, 1, None)
        self.tracer = cohort.tracer
        self.driver: Driver = drive(make_engine(folder, role, cohort=cohort, **changes))

    def names(self, *rows: Row) -> list[str]:
        self.tracer.start()
        self.driver.send(self.driver.round(rows))
        return [span.name for span in self.tracer.stop()]


def test_spans_of_a_target_say_what_forwards_are_for(tiny: Path) -> None:
    traced = Traced(tiny, TARGET)
    seq = traced.driver.start(0, PROMPT, greedy())
    assert traced.names(traced.driver.target_row(seq)) == ["prefill", "sample"]
    blocks = traced.driver.blocks_for(seq, 16)
    assert traced.names(Row(slot=0, chunk_len=1, new_block_ids=blocks)) == ["decode", "sample"]
    row = Row(slot=0, chunk_len=1, draft_token_ids=[1, 2], draft_base_len=len(PROMPT) + 2)
    assert traced.names(row) == ["verify", "sample"]


def test_spans_of_a_draft_say_what_forwards_are_for(tiny: Path) -> None:
    traced = Traced(tiny, DRAFT)
    driver = traced.driver
    seq = driver.start(0, PROMPT, greedy())
    assert traced.names(driver.draft_row(seq, 3)) == ["prefill", *["sample", "draft"] * 2, "sample"]
    blocks = driver.blocks_for(seq, 16)
    row = Row(slot=0, chunk_len=1, num_draft_tokens=2, new_block_ids=blocks)
    assert traced.names(row) == ["draft", "sample", "draft", "sample"]
    driver.fork(seq, 1, len(PROMPT))
    assert traced.names(Row(slot=1, append_token_ids=[7], chunk_len=1)) == ["transfer", "prefill"]


def test_spans_of_a_layer_parallel_draft_show_calibration(tiny: Path) -> None:
    traced = Traced(tiny, DRAFT, lp_size=2, layer_groups=[LayerGroup(layers=[0, 1])])
    driver = traced.driver
    seq = driver.start(0, PROMPT, greedy())
    driver.run((seq, driver.draft_row(seq, 4)))
    assert traced.names(driver.draft_row(seq, 1, calibrate_len=1)) == ["calibrate", "draft", "sample"]


def test_spans_nest_on_the_clock_of_the_round() -> None:
    tracer = Tracer(rank=3)
    before_ns = time.monotonic_ns()
    tracer.start()
    with tracer.span("draft"):
        TracedGroup(SoloGroup(), tracer).all_reduce(torch.zeros(1))
    tracer.add("sample", start_ns=tracer.now_ns())
    wait, draft, sample = tracer.stop()
    assert [span.name for span in (wait, draft, sample)] == ["wait", "draft", "sample"]
    assert {span.rank for span in (wait, draft, sample)} == {3}
    assert 0 <= draft.start_ns <= wait.start_ns
    assert wait.start_ns + wait.run_ns <= draft.start_ns + draft.run_ns <= sample.start_ns
    assert sample.start_ns + sample.run_ns <= time.monotonic_ns() - before_ns


def test_nothing_is_recorded_unless_asked_for() -> None:
    tracer = Tracer()
    with tracer.span("draft"):
        pass
    tracer.start()
    assert tracer.stop() == []
    with tracer.span("draft"):
        pass
    tracer.start()
    assert tracer.stop() == []


# -- over the round channel ---------------------------------------------------------------------------------------


@dataclass
class SpanEngine:
    """The engine of one of two ranks; each round is one step."""

    tracer: Tracer
    num_ranks: int = 2

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(role=TARGET)

    def check(self, round_: Round, queued: Sequence[Round] = ()) -> None:
        pass

    def run(self, round_: Round) -> RoundResult:
        with self.tracer.span("decode"):
            return RoundResult(num_steps=1)

    def reset(self) -> None:
        pass


@dataclass
class Session:
    on_last: Callable[[], None]
    role: EngineRole.ValueType = TARGET
    is_open: bool = True
    results: list[RoundResult] = field(default_factory=list)

    def deliver(self, result: RoundResult) -> None:
        self.results.append(result)
        if len(self.results) == 3:
            self.on_last()

    def reject(self, error: str) -> None:
        raise AssertionError(error)


def test_the_leader_reports_the_spans_of_all_ranks() -> None:
    """It reports them for the round that asks for them, and for no other."""
    ends = socket.socketpair()
    leader, follower = Leader([ends[0]], [], [], 10.0), Follower(ends[1], ends[1], ends[1], 10.0)
    tracers = [Tracer(0), Tracer(1)]
    thread = threading.Thread(target=follow, args=({TARGET: SpanEngine(tracers[1])}, follower, tracers[1]), daemon=True)
    thread.start()
    loop = RunLoop({TARGET: SpanEngine(tracers[0])}, leader, tracers[0])
    session = Session(on_last=lambda: loop.submit(Stop()))
    loop.submit(Opened(session))
    for round_id, trace in enumerate([False, True, False], start=1):
        loop.submit(Arrived(session, Round(round_id=round_id, trace=trace), arrived_ns=0))
    loop.run()
    leader.stop()
    thread.join()
    assert [bool(result.spans) for result in session.results] == [False, True, False]
    found = [(span.rank, span.name) for span in session.results[1].spans]
    assert found == [(0, "transfer"), (0, "decode"), (1, "decode")]
    assert all(isinstance(span, Span) and span.run_ns > 0 for span in session.results[1].spans)
    assert [result.num_steps for result in session.results] == [1, 1, 1]
