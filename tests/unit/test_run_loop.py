"""The leader's loop, run with engines that do nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

from echelon.pb.worker_pb2 import DiskContents, EngineInfo, EngineRole, MoveOrder, MoveResult, Round, RoundResult
from workers.engine.rounds import ProtocolError
from workers.process.round_channel import Leader
from workers.process.run_loop import Arrived, Opened, Ordered, RunLoop, Stop
from workers.trace import Tracer

TARGET = EngineRole.ENGINE_ROLE_TARGET
DRAFT = EngineRole.ENGINE_ROLE_DRAFT


@dataclass
class RecordingMover:
    """Answers at once, unless it keeps its answers."""

    name: str
    record: list[str]
    kept: list[Callable[[], None]] | None = None

    def submit(self, order: MoveOrder, on_moved: Callable[[MoveResult], None]) -> None:
        self.record.append(f"{self.name} move {order.move_id}")
        answer = partial(on_moved, MoveResult(move_id=order.move_id))
        if self.kept is None:
            answer()
        else:
            self.kept.append(answer)

    def list_disk(self, on_listed: Callable[[list[bytes]], None]) -> None:
        on_listed([b"on disk"])


@dataclass
class RecordingEngine:
    """Records what it is asked to do; refuses round 13 and breaks at round 66."""

    role: EngineRole.ValueType
    record: list[str]
    loop: list[RunLoop] = field(default_factory=list)
    num_ranks: int = 1
    queued: dict[int, list[int]] = field(default_factory=dict)  # for each round, those that were queued after it
    num_host_slots: int = 4
    num_disk_blocks: int = 8

    def __post_init__(self) -> None:
        self.mover = RecordingMover(EngineRole.Name(self.role)[12:].lower(), self.record)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            role=self.role,
            tp_size=1,
            num_blocks=2,
            num_host_slots=self.num_host_slots,
            num_disk_blocks=self.num_disk_blocks,
        )

    def check(self, round_: Round, queued: Sequence[Round] = ()) -> None:
        self.queued[round_.round_id] = [other.round_id for other in queued]
        if round_.round_id == 13:
            raise ProtocolError("round 13: is unlucky")

    def run(self, round_: Round) -> RoundResult:
        if round_.round_id == 66:
            raise RuntimeError("collective failed")
        if round_.round_id == 99:
            self.loop[0].submit(Stop())  # as a signal does, in the middle of a round
        self.record.append(f"{EngineRole.Name(self.role)[12:].lower()} {round_.round_id}")
        return RoundResult(num_steps=1)

    def reset(self) -> None:
        self.record.append(f"reset {EngineRole.Name(self.role)[12:].lower()}")


@dataclass
class RecordingSession:
    role: EngineRole.ValueType
    is_open: bool = True
    results: list[RoundResult] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    disk: list[DiskContents] = field(default_factory=list)

    def deliver_move(self, result: MoveResult) -> None:
        self.moved.append(result.move_id)

    def deliver_disk(self, contents: DiskContents) -> None:
        self.disk.append(contents)

    def deliver(self, result: RoundResult) -> None:
        self.results.append(result)

    def reject(self, error: str) -> None:
        self.is_open = False
        self.errors.append(error)


class Fixture:
    def __init__(self) -> None:
        self.record: list[str] = []
        self.engines = {role: RecordingEngine(role, self.record) for role in (TARGET, DRAFT)}
        self.loop = RunLoop(self.engines, Leader([], [], [], 1.0), Tracer())
        for engine in self.engines.values():
            engine.loop.append(self.loop)
        self.target, self.draft = self.open(TARGET), self.open(DRAFT)

    def open(self, role: EngineRole.ValueType) -> RecordingSession:
        session = RecordingSession(role)
        self.loop.submit(Opened(session))
        return session

    def arrive(self, session: RecordingSession, *round_ids: int) -> None:
        for round_id in round_ids:
            self.loop.submit(Arrived(session, Round(round_id=round_id, incarnation=3), arrived_ns=0))

    def order(self, session: RecordingSession, move_id: int, block_id: int = 0) -> None:
        order = MoveOrder(move_id=move_id, kind=MoveOrder.STORE, block_ids=[block_id], host_slots=[1])
        self.loop.submit(Ordered(session, order))

    def run(self) -> list[str]:
        """Runs everything that was submitted; returns what the engines did after the first resets."""
        self.arrive(self.draft, 99)
        self.loop.run()
        return self.record[2:-1]


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_rounds_of_all_engines_run_in_order_of_arrival(fixture: Fixture) -> None:
    fixture.arrive(fixture.target, 1, 2)
    fixture.arrive(fixture.draft, 1)
    fixture.arrive(fixture.target, 3)
    assert fixture.run() == ["target 1", "target 2", "draft 1", "target 3"]
    assert [(result.round_id, result.incarnation) for result in fixture.target.results] == [(1, 3), (2, 3), (3, 3)]
    assert all(result.queue_ns > 0 and result.run_ns > 0 for result in fixture.target.results)


def test_an_engine_sees_what_is_queued_behind_a_round_on_its_own_stream(fixture: Fixture) -> None:
    fixture.arrive(fixture.draft, 1, 2)
    fixture.arrive(fixture.target, 7)
    fixture.arrive(fixture.draft, 3)
    fixture.run()
    assert fixture.engines[DRAFT].queued == {1: [2, 3, 99], 2: [3, 99], 3: [99], 99: []}
    assert fixture.engines[TARGET].queued == {7: []}


def test_a_bad_round_ends_the_rounds_queued_after_it(fixture: Fixture) -> None:
    fixture.arrive(fixture.target, 1, 13, 14)
    fixture.arrive(fixture.draft, 14)
    assert fixture.run() == ["target 1", "draft 14"]
    assert fixture.target.errors == ["round 13: is unlucky"]


def test_rounds_of_a_replaced_scheduler_do_not_run(fixture: Fixture) -> None:
    fixture.arrive(fixture.target, 1)
    fixture.open(TARGET)
    fixture.arrive(fixture.target, 2)
    assert fixture.run() == ["target 1", "reset target"]


def test_moves_begin_in_order_with_the_rounds_of_their_stream(fixture: Fixture) -> None:
    fixture.arrive(fixture.target, 1)
    fixture.order(fixture.target, 1)
    fixture.arrive(fixture.target, 2)
    fixture.order(fixture.draft, 1)
    assert fixture.run() == ["target 1", "target move 1", "target 2", "draft move 1"]
    assert (fixture.target.moved, fixture.draft.moved) == ([1], [1])
    assert [list(contents.digests) for contents in fixture.target.disk] == [[b"on disk"]]


def test_a_bad_move_order_ends_its_stream_and_moves_nothing(fixture: Fixture) -> None:
    fixture.order(fixture.target, 1, block_id=2)
    fixture.order(fixture.target, 2)
    fixture.arrive(fixture.target, 1)
    fixture.order(fixture.draft, 1)
    assert fixture.run() == ["draft move 1"]
    assert fixture.target.errors == ["move 1: block_ids: block 2, must be below 2"]


def test_an_engine_without_tiers_lists_no_disk_and_moves_nothing(fixture: Fixture) -> None:
    engine = fixture.engines[TARGET]
    engine.num_host_slots = engine.num_disk_blocks = 0
    fixture.order(fixture.target, 1)
    assert fixture.run() == []
    assert fixture.target.errors == ["move 1: kind: STORE, but the engine has no host tier"]
    assert (fixture.target.disk, len(fixture.draft.disk)) == ([], 1)


def test_answers_to_a_replaced_scheduler_reach_nobody(fixture: Fixture) -> None:
    mover = fixture.engines[TARGET].mover
    mover.kept = []
    fixture.order(fixture.target, 1)
    new = fixture.open(TARGET)
    fixture.order(new, 1)
    fixture.run()
    old_answer, new_answer = mover.kept
    old_answer()
    assert (fixture.target.moved, new.moved) == ([], [])
    new_answer()
    assert (fixture.target.moved, new.moved) == ([], [1])


def test_stopping_finishes_the_running_round_and_starts_no_other(fixture: Fixture) -> None:
    fixture.arrive(fixture.target, 99, 100)
    fixture.loop.run()
    assert fixture.record[2:] == ["target 99"]
    assert [result.round_id for result in fixture.target.results] == [99]


def test_an_engine_that_breaks_ends_the_loop(fixture: Fixture) -> None:
    fixture.arrive(fixture.target, 66)
    with pytest.raises(RuntimeError, match="collective failed"):
        fixture.loop.run()
