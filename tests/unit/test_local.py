"""A deployment on this machine leaves nothing behind but the logs of a failure. The children are small fakes."""

import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import local
from cluster.errors import StartError
from cluster.local import LocalDeployment, local_settings
from cluster.process_id import PartId
from cluster.processes import spares
from cluster.processes.child import ChildProcess
from cluster.processes.vitals import VitalsWatch
from echelon.pb.process_pb2 import WorkerSpec

SETTINGS = local_settings(Path(__file__).parents[2] / "models" / "demo-target")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def behave(monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    def spawn(module: str, spec: Any, *, env: dict[str, str], **others: Any) -> ChildProcess:
        fake_spec = WorkerSpec(world_size=1)
        return ChildProcess("tests.helpers.fake_child", fake_spec, env={**env, "FAKE_BEHAVIOUR": behaviour}, **others)

    monkeypatch.setattr(spares, "ChildProcess", spawn)


def test_nothing_is_left_of_a_deployment_that_ran(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    behave(monkeypatch, "ready")
    with LocalDeployment(SETTINGS):
        (logs,) = temporary.iterdir()
        assert sorted(path.name for path in logs.iterdir()) == ["scheduler-0.log", "target-0.0.log"]
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_of_a_start_that_was_interrupted(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    def interrupt(*_: object, **others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "roll_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LocalDeployment(SETTINGS).start()
    assert list(temporary.iterdir()) == []


def test_a_failed_start_says_where_its_logs_are(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    behave(monkeypatch, "die")
    with pytest.raises(StartError, match="out of cheese; logs are in ") as caught:
        LocalDeployment(SETTINGS).start()
    (logs,) = temporary.iterdir()
    assert str(caught.value).endswith(str(logs))
    assert (logs / "target-0.0.log").read_text().endswith("out of cheese\n")


def test_logs_of_a_process_that_died_later_stay(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    behave(monkeypatch, "ready")
    with LocalDeployment(SETTINGS) as deployment:
        pid = deployment.processes.read(lambda board: board.process("target-0.0").pid)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        deadline, version = time.monotonic() + 30, -1
        while version < 0 or deployment.processes.read(lambda board: board.process("target-0.0").pid) in (pid, None):
            assert time.monotonic() < deadline, "it is not started again"
            deployment.processes.wait_change(version, timeout_s=1.0)
            version = deployment.processes.read(lambda board: board.version)
    (logs,) = temporary.iterdir()
    assert f"target-0.0: was killed by SIGKILL; last words: its log is empty; logs are in {logs}" in caplog.text


def test_a_start_that_breaks_is_repeated(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    behave(monkeypatch, "ready")
    with LocalDeployment(SETTINGS) as deployment:
        spawn, failures = spares.ChildProcess, [OSError("too many open files")]

        def failing(*args: Any, **others: Any) -> ChildProcess:
            if failures:
                raise failures.pop()
            return spawn(*args, **others)

        monkeypatch.setattr(spares, "ChildProcess", failing)
        pid = deployment.processes.read(lambda board: board.process("target-0.0").pid)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not any("is up again" in event.text for event in deployment.supervisor.events()):
            assert time.monotonic() < deadline, deployment.supervisor.events()
            deployment.processes.wait_change(-1, timeout_s=0.05)
        assert any("too many open files" in event.text for event in deployment.supervisor.events())


def test_a_drain_does_not_guess_that_nothing_runs(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    behave(monkeypatch, "ready")  # but the scheduler answers no question
    with (
        LocalDeployment(SETTINGS) as deployment,
        pytest.raises(StartError, match="scheduler-0 cannot be asked whether any still run"),
    ):
        deployment.supervisor.drain(timeout_s=0.1)


def test_an_error_while_losses_are_looked_for_is_not_the_end_of_that(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    behave(monkeypatch, "ready")
    lost, broken = VitalsWatch.lost, threading.Event()

    def break_once(vitals: VitalsWatch) -> dict[PartId, str]:
        if broken.is_set():
            return lost(vitals)
        broken.set()
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(VitalsWatch, "lost", break_once)
    with LocalDeployment(SETTINGS) as deployment:
        assert broken.wait(30)
        deployment.supervisor.restart("target-0.0")


def test_a_part_that_is_removed_while_it_starts_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    behave(monkeypatch, "ready")
    with LocalDeployment(replace(SETTINGS, num_replicas=2, max_replicas=2)) as deployment:
        behave(monkeypatch, "silent")
        with ThreadPoolExecutor(1) as pool:
            restart = pool.submit(deployment.supervisor.restart, "target-1.0")
            version = -1
            while not any(event.text == "is started again" for event in deployment.supervisor.events()):
                deployment.processes.wait_change(version, timeout_s=0.05)
            deployment.supervisor.remove(deployment.plan.replicas[1])
            with pytest.raises(StartError, match="target-1 was removed before it was up again"):
                restart.result(30)
        assert len(deployment.running.replicas) == 1
