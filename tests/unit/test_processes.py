"""Child processes: their events arrive, and nothing of them is left behind. The children are small fakes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import StartError
from cluster.process_id import ProcessId
from cluster.processes.child import Child, ChildProcess
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.status import ProcessStatus, State
from cluster.processes.worker_group import start_worker_group
from echelon.pb.process_pb2 import ProcessEvent, WorkerSpec

FAKE = "tests.helpers.fake_child"
ANSWER_S = 30.0


def spec(rank: int = 0, world_size: int = 1) -> WorkerSpec:
    return WorkerSpec(name=f"target-0.{rank}", rank=rank, world_size=world_size, threads=2, incarnation=7)


def start(tmp_path: Path, behaviour: str) -> ChildProcess:
    return ChildProcess(FAKE, spec(), name="fake", log_path=tmp_path / "fake.log", env={"FAKE_BEHAVIOUR": behaviour})


def events_of(child: ChildProcess, kind: str) -> ProcessEvent:
    """Reads events until one of this kind comes."""
    while True:
        event = child.next_event(ANSWER_S)
        assert event is not None, f"{child.name} ended or stays silent; log: {child.stderr_tail()}"
        if event.WhichOneof("event") == kind:
            return event


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + ANSWER_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} was left behind"
        os.sched_yield()


def test_events_arrive_and_stop_ends_the_child(tmp_path: Path) -> None:
    child = start(tmp_path, "noisy")
    assert events_of(child, "progress").progress.done == 1
    assert events_of(child, "ready").ready.address == "127.0.0.1:5678"
    assert child.poll() is None
    child.stop(grace_s=ANSWER_S)
    assert child.poll() == -signal.SIGTERM
    assert child.next_event(ANSWER_S) is None


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    child = start(tmp_path, "stubborn")
    events_of(child, "ready")
    child.stop(grace_s=0.1)
    assert child.poll() == -signal.SIGKILL


def test_processes_started_by_a_child_end_with_it(tmp_path: Path) -> None:
    child = start(tmp_path, "orphan")
    events_of(child, "ready")
    grandchildren = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(grandchildren) == 1
    child.stop(grace_s=ANSWER_S)
    wait_until_gone(int(grandchildren[0]))


PARENT_THAT_DIES = """
import os, sys
from pathlib import Path
from cluster.process_id import ProcessId
from cluster.processes.child import ChildProcess
from echelon.pb.process_pb2 import WorkerSpec
child = ChildProcess(sys.argv[1], WorkerSpec(name="fake"), name="fake", log_path=Path(sys.argv[2]))
while child.next_event(30.0).WhichOneof("event") != "ready":
    pass
os.write(1, str(child.pid).encode())
os._exit(0)
"""


def test_a_child_ends_when_its_parent_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT_THAT_DIES, FAKE, str(tmp_path / "fake.log")]
    wait_until_gone(int(subprocess.run(command, capture_output=True, check=True).stdout))


class Spawner:
    """Starts fakes. `behaviours`: by name; the default is "ready"."""

    def __init__(self, tmp_path: Path, behaviours: dict[str, str] | None = None) -> None:
        self.children: list[ChildProcess] = []
        self._tmp_path = tmp_path
        self._behaviours = behaviours or {}

    def __call__(self, launch: Launch) -> Child:
        env = {**launch.env, "FAKE_BEHAVIOUR": self._behaviours.get(launch.name, "ready")}
        log_path = self._tmp_path / f"{launch.name}.log"
        child = ChildProcess(FAKE, launch.spec, name=launch.name, log_path=log_path, env=env)
        self.children.append(child)
        return child


@pytest.fixture
def to_stop() -> Iterator[list[ProcessSet]]:
    sets: list[ProcessSet] = []
    yield sets
    for processes in sets:
        processes.stop(grace_s=1.0)


def test_the_leaders_store_goes_to_the_other_ranks(tmp_path: Path, to_stop: list[ProcessSet]) -> None:
    stages: dict[str, set[str]] = {}

    def note(process: ProcessStatus) -> None:
        stages.setdefault(process.name, set()).add(process.stage)

    specs = [spec(rank, 3) for rank in range(3)]
    group, processes = start_worker_group(specs, Spawner(tmp_path), on_progress=note, timeout_s=ANSWER_S)
    to_stop.append(processes)
    assert group.address == "127.0.0.1:5678"
    assert group.incarnation == 7
    assert group.info.world_size == 3
    assert group.info.device.endswith("omp=2 passive"), "thread pools are set up before the worker has read its spec"
    assert "rank 0 joins nobody" in stages["target-0.0"]
    assert "rank 2 joins 127.0.0.1:1234" in stages["target-0.2"]


def test_a_failed_rank_fails_the_group_with_its_message(tmp_path: Path) -> None:
    spawn = Spawner(tmp_path, {"target-0.1": "fail"})
    with pytest.raises(StartError, match=r"^target-0\.1: the weights are made of cheese; use other weights$") as caught:
        start_worker_group([spec(rank, 2) for rank in range(2)], spawn, timeout_s=ANSWER_S)
    assert caught.value.detail == "Traceback: cheese"
    assert [child.poll() is None for child in spawn.children] == [False, False], "everything was stopped"


def test_a_rank_that_dies_without_a_message_is_described_by_its_log(tmp_path: Path) -> None:
    spawn = Spawner(tmp_path, {"target-0.0": "die"})
    with pytest.raises(StartError, match=r"target-0\.0: ended with exit status 3; last words: out of cheese") as caught:
        start_worker_group([spec()], spawn, timeout_s=ANSWER_S)
    assert caught.value.detail == "first line\nout of cheese"


def test_a_child_that_comes_up_during_the_stop_is_stopped_too(tmp_path: Path) -> None:
    spawner = Spawner(tmp_path)

    def spawn(launch: Launch) -> Child:
        child = spawner(launch)
        processes.stop(grace_s=1.0)  # as if by another thread, which has not seen this child yet
        return child

    processes = ProcessSet(spawn)
    with pytest.raises(StartError, match=r"target-0\.0: ended again, the deployment is being taken down"):
        processes.launch(Launch(id=ProcessId(role="target", rank=0), module=FAKE, spec=spec()))
    assert spawner.children[0].poll() is not None


def test_a_late_rank_is_named_with_what_it_last_reported(tmp_path: Path) -> None:
    spawn = Spawner(tmp_path, {"target-0.0": "silent"})
    with pytest.raises(StartError, match=r"not ready in time: target-0\.0: (started|rank 0 joins nobody 1/2)"):
        start_worker_group([spec()], spawn, timeout_s=0.5)


def test_a_process_that_dies_later_changes_the_deployments_state(tmp_path: Path, to_stop: list[ProcessSet]) -> None:
    spawn = Spawner(tmp_path)
    _, processes = start_worker_group([spec()], spawn, timeout_s=ANSWER_S)
    to_stop.append(processes)
    processes.all_ready()
    assert processes.read(lambda board: board.deployment()) == (State.READY, "")
    version = processes.read(lambda board: board.version)
    assert spawn.children[0].pid is not None
    os.kill(spawn.children[0].pid, signal.SIGKILL)
    processes.wait_change(version, ANSWER_S)
    state, reason = processes.read(lambda board: board.deployment())
    assert state is State.RECOVERING
    assert reason.startswith("target-0.0: was killed by SIGKILL")


@pytest.mark.parametrize(("compile_", "waits"), [("off", "default"), ("auto", "passive")])
def test_threads_spin_only_on_cores_of_their_own(
    tmp_path: Path, to_stop: list[ProcessSet], compile_: str, waits: str
) -> None:
    """Compiled kernels have threads too, and those share the cores with torch's."""
    pinned = spec()
    pinned.cpu_ids.extend([0, 1])
    pinned.compile = compile_
    group, processes = start_worker_group([pinned], Spawner(tmp_path), timeout_s=ANSWER_S)
    to_stop.append(processes)
    assert group.info.device.endswith(f"omp=2 {waits}")
