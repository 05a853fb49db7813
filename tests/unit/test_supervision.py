"""The reports of the processes decide the state of the deployment."""

import signal
from dataclasses import replace

import pytest

from cluster.deployment.settings import Role
from cluster.process_id import ProcessId
from cluster.processes.status import State
from cluster.processes.supervision import Board
from echelon.pb.process_pb2 import Failed, ProcessEvent, Progress, Ready
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, EngineInfo, WorkerInfo

PROCESSES = [
    ProcessId(role="target", rank=0),
    ProcessId(role="target", rank=1),
    ProcessId(role="draft", rank=0),
    ProcessId(role="scheduler"),
    ProcessId(role="gateway"),
]
READY = ProcessEvent(ready=Ready(address="127.0.0.1:1"))


@pytest.fixture
def board() -> Board:
    return Board(PROCESSES)


def serving(*more: ProcessId) -> Board:
    board = Board((*PROCESSES, *more))
    for process in (*PROCESSES, *more):
        board.on_launch(process, "10.0.0.1")
        board.on_event(process.name, READY)
    board.on_all_ready()
    return board


def test_tells_what_the_first_ready_rank_says_of_an_engine(board: Board) -> None:
    assert board.engine_info(ENGINE_ROLE_TARGET) is None
    board.on_launch(PROCESSES[1], "10.0.0.1")
    target = EngineInfo(role=ENGINE_ROLE_TARGET, batch_invariant=True)
    engines = [EngineInfo(role=ENGINE_ROLE_DRAFT), target]
    board.on_event("target-0.1", ProcessEvent(ready=Ready(worker=WorkerInfo(engines=engines))))
    assert board.engine_info(ENGINE_ROLE_TARGET) == target


def test_a_start_waits_for_all_processes(board: Board) -> None:
    board.on_launch(PROCESSES[0], "10.0.0.1")
    board.on_event("target-0.0", ProcessEvent(progress=Progress(stage="loading target weights", done=3, total=9)))
    board.on_launch(PROCESSES[1], "10.0.0.1")
    assert board.deployment()[0] is State.STARTING
    assert board.laggards().startswith(
        "target-0.0: loading target weights 3/9; target-0.1: started, has reported nothing; draft-0.0: not started"
    )


def test_the_role_of_a_dead_process_decides_whether_the_deployment_serves() -> None:
    assert serving().deployment() == (State.READY, "")
    board = serving()
    board.on_exit("draft-0.0", -signal.SIGKILL, "")
    state, reason = board.deployment()
    assert state is State.DEGRADED, "without a draft it is slower, not down"
    assert reason == "draft-0.0: was killed by SIGKILL; last words: its log is empty"
    board.on_exit("target-0.1", 1, "loading\nout of memory\n\n")
    state, reason = board.deployment()
    assert state is State.RECOVERING, "it is started again"
    assert reason.endswith("target-0.1: ended with exit status 1; last words: out of memory")


def test_a_draft_that_never_came_up_fails_the_start(board: Board) -> None:
    board.on_event("draft-0.0", ProcessEvent(failed=Failed(error="no such file", detail="Traceback")))
    assert board.deployment() == (State.FAILED, "draft-0.0: no such file")
    assert board.detail("draft-0.0") == "Traceback"


@pytest.mark.parametrize(("role", "expected"), [("draft", State.DEGRADED), ("target", State.RECOVERING)])
def test_the_role_decides_what_a_lost_group_means(role: Role, expected: State) -> None:
    board = serving()
    board.on_exit(f"{role}-0.0", 1, "")
    state, reason = board.deployment()
    assert state is expected
    assert reason.startswith(f"{role}-0.0: ")


def test_a_replica_is_not_needed_while_there_is_another() -> None:
    second = [replace(process, replica=1) for process in PROCESSES if process.role != "gateway"]
    board = serving(*second)
    for name in ("target-1.0", "scheduler-1"):
        board.on_exit(name, 1, "")
    board.on_given_up(["target-1.0"])
    assert board.deployment()[0] is State.DEGRADED
    board.on_exit("target-0.0", 1, "")
    assert board.deployment()[0] is State.RECOVERING, "the first one comes back"
    board.on_given_up(["target-0.0"])
    assert board.deployment()[0] is State.FAILED


def test_a_needed_part_that_is_given_up_fails_the_deployment() -> None:
    board = serving()
    board.on_exit("target-0.0", 1, "")
    board.on_given_up(["target-0.0", "target-0.1"])
    assert board.deployment()[0] is State.FAILED
    board = serving()
    board.on_exit("draft-0.0", 1, "")
    board.on_given_up(["draft-0.0"])
    assert board.deployment()[0] is State.DEGRADED


def test_a_process_that_is_started_again_forgets_its_end() -> None:
    board = serving()
    board.on_exit("target-0.0", 1, "out of memory")
    board.on_cleared("target-0.0")
    assert board.deployment() == (State.RECOVERING, "target-0.0: not started")
    assert board.first_failure() is None, "a start that waits for it does not fail"
    board.on_launch(PROCESSES[0], "10.0.0.1")
    board.on_event("target-0.0", ProcessEvent(progress=Progress(stage="loading target weights", done=3, total=9)))
    assert board.deployment() == (State.RECOVERING, "target-0.0: loading target weights 3/9")
    board.on_event("target-0.0", READY)
    assert board.deployment() == (State.READY, "")


def test_a_process_that_hangs_counts_as_failed() -> None:
    board = serving()
    board.on_useless("target-0.0", "the scheduler cannot reach it")
    assert board.deployment() == (State.RECOVERING, "target-0.0: the scheduler cannot reach it")
    failed = board.first_failure(["target-0.0", "target-0.1"])
    assert failed is not None
    assert failed.name == "target-0.0"
    assert board.first_failure(["draft-0.0"]) is None


def test_the_first_failure_is_the_cause(board: Board) -> None:
    board.on_event("target-0.1", ProcessEvent(failed=Failed(error="bad shape")))
    board.on_event("target-0.0", ProcessEvent(failed=Failed(error="lost rank 1")))
    first = board.first_failure()
    assert first is not None
    assert first.error == "bad shape"


def test_the_last_event_counts_more_than_the_exit_status(board: Board) -> None:
    board.on_event("target-0.0", ProcessEvent(failed=Failed(error="bad shape")))
    board.on_exit("target-0.0", 1, "noise")
    assert board.process("target-0.0").error == "bad shape"


def test_an_ordered_stop_is_not_a_failure() -> None:
    board = serving()
    board.on_stopping()
    board.on_exit("target-0.0", -signal.SIGTERM, "")
    assert board.deployment()[0] is State.STOPPING
    assert board.process("target-0.0").state is State.STOPPED
    assert board.first_failure() is None


def test_every_change_makes_a_new_version() -> None:
    board = serving()
    version = board.version
    board.on_place("target-0.0", pid=7, devices="cuda:1")
    assert board.version == version + 1
    board.on_place("target-0.0", pid=7, devices="cuda:1")
    assert board.version == version + 1, "nothing changed"


def test_a_replica_that_joins_changes_the_state_only_when_it_has_joined() -> None:
    board = serving()
    second = [replace(process, replica=1) for process in PROCESSES if process.role != "gateway"]
    names = [process.name for process in second]
    board.on_joining(second)
    board.on_launch(second[0], "10.0.0.2")
    assert board.deployment() == (State.READY, "")
    assert board.process("target-1.0").state is State.STARTING
    board.on_exit("target-1.0", 1, "")
    assert board.deployment() == (State.READY, "")
    failed = board.first_failure(names)
    assert failed is not None
    assert failed.name == "target-1.0"
    board.on_joined(names)
    assert board.deployment()[0] is State.DEGRADED


def test_a_gateway_is_not_needed_while_there_is_another() -> None:
    board = serving(ProcessId(role="gateway", replica=1))
    board.on_exit("gateway-1", 1, "")
    assert board.deployment()[0] is State.DEGRADED
    board.on_exit("gateway-0", 1, "")
    assert board.deployment()[0] is State.RECOVERING
    board.on_given_up(["gateway-0", "gateway-1"])
    assert board.deployment()[0] is State.FAILED


def test_what_is_removed_is_forgotten() -> None:
    second = [replace(process, replica=1) for process in PROCESSES if process.role != "gateway"]
    board = serving(*second)
    board.on_exit("target-1.0", 1, "")
    board.on_given_up(["target-1.0"])
    board.on_removed([process.name for process in second])
    assert board.deployment() == (State.READY, "")
    assert [process.id for process in board.processes] == PROCESSES
    assert board.first_failure() is None
