"""Spares: which ranks have one, and what a process that waits for its spec becomes. The processes are small fakes."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.deployment.settings import Role
from cluster.planning.plan import Bundle, MemoryEstimate
from cluster.processes import spares
from cluster.processes.child import ChildProcess
from cluster.processes.spares import Recipe, SpareKeeper, delay_s, with_spares
from echelon.pb.process_pb2 import ProcessEvent, WorkerSpec

FAKE = "tests.helpers.fake_child"
ANSWER_S = 30.0


def bundle(group: str, rank: int, node: str = "a", replica: int = 0) -> Bundle:
    role: Role = "target" if group == "target" else "draft"
    return Bundle(
        group=role,
        rank=rank,
        replica=replica,
        engines=(role,),
        node_id=node,
        address="127.0.0.1",
        num_gpus=0,
        num_cpus=1.0,
        cpu_ids=(),
        memory=MemoryEstimate(weight_bytes=0, kv_cache_bytes=0, activation_bytes=0),
    )


def test_targets_come_first_and_each_node_has_its_own_number() -> None:
    bundles = [
        bundle("draft", 0, "a"),
        bundle("target", 0, "a"),
        bundle("target", 1, "a"),
        bundle("target", 2, "b"),
        bundle("target", 0, "b", replica=1),
    ]
    assert with_spares(bundles, "auto") == ["target-0.0", "target-0.1", "target-0.2", "target-1.0"]
    assert with_spares(bundles, 0) == []
    assert with_spares(bundles, 1) == ["target-0.0", "target-0.2"]
    assert with_spares(bundles, 3) == ["target-0.0", "target-0.1", "target-0.2", "target-1.0", "draft-0.0"]


def test_spares_that_end_again_and_again_are_started_ever_more_rarely() -> None:
    assert [delay_s(number) for number in (1, 2, 3)] == [2.0, 4.0, 8.0]
    assert delay_s(100) == 300.0


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(module=FAKE, spare_module=FAKE, name="target-0.0", log_dir=tmp_path, env={"OMP_NUM_THREADS": "2"})


@pytest.fixture
def keeper() -> Iterator[SpareKeeper]:
    keeper, children = SpareKeeper(), list[ChildProcess]()
    start = keeper.start

    def noted(*args: object, **options: object) -> ChildProcess:
        children.append(start(*args, **options))  # type: ignore[arg-type]
        return children[-1]

    keeper.start = noted  # type: ignore[method-assign]
    yield keeper
    keeper.keep(False)
    for child in children:
        child.stop(grace_s=0.0)


def first(keeper: SpareKeeper, recipe: Recipe) -> ChildProcess:
    return keeper.start(recipe, WorkerSpec(), log_name="target-0.0.log")


def second(keeper: SpareKeeper, recipe: Recipe) -> ChildProcess:
    return keeper.start(recipe, WorkerSpec(), log_name="target-0.0.2.log")


def news_of(child: ChildProcess) -> ProcessEvent:
    """The next one that is of a spare."""
    while True:
        event = child.next_event(ANSWER_S)
        assert event is not None, f"{child.name} ended or stays silent; log: {child.stderr_tail()}"
        if event.HasField("spare"):
            return event


def wait_for(child: ChildProcess, state: str) -> None:
    while news_of(child).spare.state != state:
        pass


def only_spare_of(child: ChildProcess) -> int:
    """Its pid. This process has no other children."""
    started: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            started.update(map(int, path.read_text().split()))
    (pid,) = (pid for pid in started - {child.pid} if FAKE in Path(f"/proc/{pid}/cmdline").read_text())
    return pid


def test_a_spare_becomes_the_next_process(keeper: SpareKeeper, recipe: Recipe, tmp_path: Path) -> None:
    child = first(keeper, recipe)
    keeper.keep(True)
    wait_for(child, "ready")
    spare_pid = only_spare_of(child)
    child.stop(grace_s=0.0)
    again = second(keeper, recipe)
    assert again.pid == spare_pid
    assert again.next_event(ANSWER_S) == ProcessEvent(spare={"used": True})  # type: ignore[arg-type]
    assert again.next_event(ANSWER_S).WhichOneof("event") == "progress"  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target-0.0.2.log", "target-0.0.log"]
    keeper.keep(True)
    wait_for(again, "ready")


def test_a_spare_of_another_environment_is_not_used(keeper: SpareKeeper, recipe: Recipe) -> None:
    child = first(keeper, recipe)
    keeper.keep(True)
    wait_for(child, "ready")
    spare_pid = only_spare_of(child)
    again = second(keeper, replace(recipe, env={"OMP_NUM_THREADS": "3"}))
    assert again.pid != spare_pid
    assert not Path(f"/proc/{spare_pid}").exists()


def test_a_spare_that_still_imports_is_not_waited_for(keeper: SpareKeeper, recipe: Recipe) -> None:
    slow = replace(recipe, env={"FAKE_BEHAVIOUR": "importing"})
    child = first(keeper, slow)
    keeper.keep(True)
    wait_for(child, "starting")
    spare_pid = only_spare_of(child)
    assert second(keeper, slow).pid != spare_pid


def test_a_spare_that_dies_is_replaced(keeper: SpareKeeper, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_FIRST_DELAY_S", 0.01)
    child = first(keeper, recipe)
    keeper.keep(True)
    wait_for(child, "ready")
    os.kill(only_spare_of(child), signal.SIGKILL)
    wait_for(child, "")
    wait_for(child, "ready")


def test_nothing_is_left_of_a_spare_that_is_not_wanted(keeper: SpareKeeper, recipe: Recipe, tmp_path: Path) -> None:
    child = first(keeper, recipe)
    keeper.keep(True)
    wait_for(child, "ready")
    spare_pid = only_spare_of(child)
    keeper.keep(False)
    wait_for(child, "")
    assert not Path(f"/proc/{spare_pid}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target-0.0.log"]


def test_a_start_that_is_prepared_is_no_spare(keeper: SpareKeeper, recipe: Recipe) -> None:
    keeper.prepare(recipe)
    child = first(keeper, recipe)
    event = child.next_event(ANSWER_S)
    assert event is not None
    assert event.WhichOneof("event") == "progress"
