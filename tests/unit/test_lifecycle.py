"""A failed start leaves nothing on this machine, and the error says what went wrong."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from cluster import lifecycle, state_dir
from cluster.deployment.deployment_file import load_deployment
from cluster.errors import StartError
from cluster.local import local_settings
from cluster.on_ray import lifecycle as ray_lifecycle
from cluster.on_ray.controller import Controller
from cluster.on_ray.desired import DesiredState
from cluster.private_ray import PrivateRay
from cluster.processes import rollout
from cluster.processes.status import State

DEMO = Path(__file__).parents[2] / "deploy" / "demo.yaml"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def test_a_file_that_cannot_be_copied_does_not_claim_the_name(root: Path) -> None:
    pipe = root / "pipe"  # what `echelon up <(sed ...)` gives
    os.mkfifo(pipe)
    with pytest.raises(StartError, match=r"cannot be copied to .*; give a regular file"):
        state_dir.claim("demo", pipe)
    assert state_dir.names() == []


def test_a_state_folder_that_cannot_be_written_is_named(root: Path) -> None:
    (root / "state").write_text("a file")
    with pytest.raises(StartError, match=r"state/demo cannot be written: .*; set ECHELON_STATE_DIR"):
        state_dir.claim("demo", DEMO)


def test_an_empty_record_means_a_deployment_that_never_started(root: Path) -> None:
    """Its `up` died between taking the name and writing the record."""
    (root / "state" / "demo").mkdir(parents=True)
    (root / "state" / "demo" / "record.json").touch()
    assert lifecycle.status("demo").state is State.PENDING
    lifecycle.down("demo")
    assert state_dir.names() == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": "demo"}', '{"name": "demo", "private_ray": 3}', "\0"])
def test_a_damaged_record_is_named(root: Path, content: str) -> None:
    (root / "state" / "demo").mkdir(parents=True)
    (root / "state" / "demo" / "record.json").write_text(content)
    for command in (lifecycle.status, lifecycle.down):
        with pytest.raises(StartError, match=r"demo/record\.json is damaged: .*; end what .*, then remove the file"):
            command("demo")


def test_a_failed_start_says_why_even_if_it_was_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(log_path: Path) -> NoReturn:
        state_dir.forget("demo")  # `echelon down demo` in another terminal
        raise StartError("Ray is out of cheese")

    monkeypatch.setattr(lifecycle, "start_private_ray", fail)
    with pytest.raises(StartError, match="Ray is out of cheese"):
        lifecycle.up(DEMO)


def test_a_failure_to_clean_up_does_not_hide_why_the_start_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **callbacks: object) -> NoReturn:
        raise StartError("Ray is out of cheese")

    def fail_too(record: state_dir.Record, grace_s: float) -> NoReturn:
        raise StartError("Ray still has a gateway")

    monkeypatch.setattr(lifecycle, "is_listening", lambda address: True)
    monkeypatch.setattr(ray_lifecycle, "deploy", fail)
    monkeypatch.setattr(ray_lifecycle, "end", fail_too)
    with pytest.raises(StartError, match="Ray is out of cheese"):
        lifecycle.up(DEMO, ray_address="10.0.0.1:6379")
    assert "demo is not entirely gone: Ray still has a gateway; run: echelon down demo" in caplog.text


def test_a_hanging_private_ray_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(record: state_dir.Record, grace_s: float) -> NoReturn:
        raise StartError("cannot connect to the Ray cluster")

    ended: list[PrivateRay] = []
    private = PrivateRay(address="127.0.0.2:1", pid=1, token="t", temp_dir="/tmp/t")
    monkeypatch.setattr(lifecycle, "is_listening", lambda address: True)
    monkeypatch.setattr(ray_lifecycle, "end", hang)
    monkeypatch.setattr(lifecycle, "stop_private_ray", lambda ray, grace_s: ended.append(ray))
    record = state_dir.claim("demo", DEMO)
    state_dir.save(replace(record, ray_address=private.address, private_ray=private))
    lifecycle.down("demo")
    assert ended == [private]
    assert state_dir.names() == []
    shared = state_dir.claim("demo", DEMO)
    state_dir.save(replace(shared, ray_address="10.0.0.1:6379"))
    with pytest.raises(StartError, match="cannot connect"):
        lifecycle.down("demo")
    assert state_dir.names() == ["demo"], "so that down can be tried again"


def test_an_unexpected_error_fails_the_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(host: str, port: int, key: str) -> NoReturn:
        raise ZeroDivisionError("cheese / 0")

    monkeypatch.setattr(rollout, "check_port", break_down)
    plan = lifecycle.plan(DEMO)
    desired = DesiredState(settings=load_deployment(DEMO), plan=plan, log_dir=root, timeout_s=60.0)
    starting = Controller(desired)
    for thread in threading.enumerate():
        if thread.name == "start":
            thread.join()
    _, status = starting.status()
    assert (status.state, status.reason) == (State.FAILED, "ZeroDivisionError: cheese / 0")
    assert "break_down" in status.detail


def test_the_scheduler_waits_at_least_as_long_as_the_ranks() -> None:
    target = DEMO.parents[1] / "models" / "demo-target"
    assert local_settings(target, collective_timeout_s=300.0).round_timeout_s == 300.0
