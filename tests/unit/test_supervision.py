"""The reports of the processes decide the state of the deployment."""

import signal

import pytest

from cluster.deployment.settings import Role
from cluster.process_id import ProcessId
from cluster.processes.status import State
from cluster.processes.supervision import Board
from echelon.pb.process_pb2 import Failed, ProcessEvent, Progress, Ready

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


def serving() -> Board:
    board = Board(PROCESSES)
    for process in PROCESSES:
        board.on_launch(process, "10.0.0.1")
        board.on_event(process.name, READY)
    board.on_all_ready()
    return board


def test_a_start_waits_for_everybody(board: Board) -> None:
    board.on_launch(PROCESSES[0], "10.0.0.1")
    board.on_event("target-0.0", ProcessEvent(progress=Progress(stage="loading target weights", done=3, total=9)))
    board.on_launch(PROCESSES[1], "10.0.0.1")
    assert board.deployment()[0] is State.STARTING
    assert board.laggards().startswith(
        "target-0.0: loading target weights 3/9; target-0.1: started, has reported nothing; draft-0.0: not started"
    )


def test_what_dies_decides_whether_it_still_serves() -> None:
    assert serving().deployment() == (State.READY, "")
    board = serving()
    board.on_exit("draft-0.0", -signal.SIGKILL, "")
    state, reason = board.deployment()
    assert state is State.DEGRADED, "without a draft it is slower, not down"
    assert reason == "draft-0.0: was killed by SIGKILL; last words: its log is empty"
    board.on_exit("target-0.1", 1, "loading\nout of memory\n\n")
    state, reason = board.deployment()
    assert state is State.FAILED
    assert reason.endswith("target-0.1: ended with exit status 1; last words: out of memory")


def test_a_draft_that_never_came_up_fails_the_start(board: Board) -> None:
    board.on_event("draft-0.0", ProcessEvent(failed=Failed(error="no such file", detail="Traceback")))
    assert board.deployment() == (State.FAILED, "draft-0.0: no such file")
    assert board.detail("draft-0.0") == "Traceback"


@pytest.mark.parametrize(("role", "expected"), [("draft", State.DEGRADED), ("target", State.FAILED)])
def test_the_role_decides_what_a_lost_group_means(role: Role, expected: State) -> None:
    board = serving()
    of_another_replica = ProcessId(role=role, replica=1, rank=0)
    board.on_launch(of_another_replica, "10.0.0.2")
    board.on_exit(of_another_replica.name, 1, "")
    state, reason = board.deployment()
    assert state is expected
    assert reason.startswith(f"{role}-1.0: ")


def test_the_first_failure_is_the_cause(board: Board) -> None:
    board.on_event("target-0.1", ProcessEvent(failed=Failed(error="bad shape")))
    board.on_event("target-0.0", ProcessEvent(failed=Failed(error="lost rank 1")))
    first = board.first_failure()
    assert first is not None
    assert first.error == "bad shape"


def test_the_last_word_counts_more_than_the_exit_status(board: Board) -> None:
    board.on_event("target-0.0", ProcessEvent(failed=Failed(error="bad shape")))
    board.on_exit("target-0.0", 1, "noise")
    assert board.process("target-0.0").error == "bad shape"


def test_an_end_that_was_ordered_is_no_failure() -> None:
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
