"""A deployment in the foreground: when it waits, when it ends, and that it always takes down what it started."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import foreground, lifecycle, state_dir
from cluster.errors import DeploymentNotFoundError, PlanError, StartError
from cluster.foreground import Stopped, serve
from cluster.lifecycle import OnEvent, PlanMade
from cluster.processes.status import DeploymentStatus, State

DEMO = Path(__file__).parents[2] / "deploy" / "demo.yaml"
Answer = State | BaseException


class Deployments:
    """What `cluster.lifecycle` would do: answers of `up` and `status`, one after the other."""

    def __init__(self, *, ups: list[Answer], states: list[Answer]) -> None:
        self.done: list[str] = []
        self._ups, self._states = ups, states
        self.out_of_reach = False

    def up(self, path: Path, *, ray_address: str | None, on_event: OnEvent) -> DeploymentStatus:
        self.done.append("up")
        answer = self._ups.pop(0)
        if not isinstance(answer, PlanError):
            on_event(PlanMade(plan=None))  # type: ignore[arg-type]  # nobody looks at it
        return self._status(answer)

    def status(self, name: str) -> DeploymentStatus:
        self.done.append("status")
        return self._status(self._states.pop(0))

    def down(self, name: str) -> None:
        self.done.append("down")
        if self.out_of_reach:
            self.out_of_reach = False
            raise StartError("its Ray does not answer")

    def _status(self, answer: Answer) -> DeploymentStatus:
        if isinstance(answer, BaseException):
            raise answer
        return DeploymentStatus(name="demo", state=answer, reason="a reason")


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Deployments]:
    def install(*, ups: list[Answer], states: list[Answer]) -> Deployments:
        fake = Deployments(ups=ups, states=states)
        for name in ("up", "status", "down"):
            monkeypatch.setattr(lifecycle, name, getattr(fake, name))
        monkeypatch.setattr(foreground, "RETRY_S", 0.0)
        return fake

    return install


def test_it_ends_when_it_is_asked_to(deployments: Callable[..., Deployments]) -> None:
    fake = deployments(ups=[State.READY], states=[State.RECOVERING, State.READY, Stopped()])
    ready: list[State] = []
    serve(DEMO, on_ready=lambda status: ready.append(status.state), look_s=0)
    assert fake.done == ["down", "up", "status", "status", "status", "down"]
    assert ready == [State.READY]


def test_it_ends_when_it_was_taken_down_elsewhere(deployments: Callable[..., Deployments]) -> None:
    fake = deployments(ups=[State.READY], states=[DeploymentNotFoundError()])
    serve(DEMO, look_s=0)
    assert fake.done[-2:] == ["status", "down"]


def test_an_earlier_one_that_is_out_of_reach_is_forgotten(
    deployments: Callable[..., Deployments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pod of a Ray has been replaced, and its address now belongs to somebody else."""
    monkeypatch.setenv("ECHELON_STATE_DIR", str(tmp_path))
    state_dir.claim("demo", DEMO)
    fake = deployments(ups=[State.READY], states=[Stopped()])
    fake.out_of_reach = True
    serve(DEMO, look_s=0)
    assert fake.done == ["down", "up", "status", "down"]
    assert state_dir.names() == []


def test_a_controller_that_does_not_answer_for_a_moment_costs_nothing(
    deployments: Callable[..., Deployments],
) -> None:
    silent = [State.FAILED, State.FAILED, State.READY]
    fake = deployments(ups=[State.READY], states=[*silent, *silent, Stopped()])
    serve(DEMO, look_s=0)
    assert fake.done.count("status") == 7


def test_a_failure_is_told_once_everything_is_down(deployments: Callable[..., Deployments]) -> None:
    fake = deployments(ups=[State.READY], states=[State.DEGRADED, *[State.FAILED] * 3])
    with pytest.raises(StartError, match="demo is FAILED: a reason"):
        serve(DEMO, look_s=0)
    assert fake.done == ["down", "up", *["status"] * 4, "down"]


def test_a_cluster_without_a_place_is_asked_again(
    deployments: Callable[..., Deployments], caplog: pytest.LogCaptureFixture
) -> None:
    fake = deployments(ups=[PlanError("no place"), PlanError("no place"), State.READY], states=[Stopped()])
    serve(DEMO, patience_s=60, look_s=0)
    assert fake.done.count("up") == 3
    assert caplog.messages == ["waiting for the cluster: no place"], "what changes is told, once"


def test_without_patience_it_is_asked_once(deployments: Callable[..., Deployments]) -> None:
    fake = deployments(ups=[PlanError("no place")], states=[])
    with pytest.raises(PlanError):
        serve(DEMO)
    assert fake.done == ["down", "up", "down"]


def test_a_start_that_fails_is_not_repeated(deployments: Callable[..., Deployments]) -> None:
    """Loading again for hours what cannot be loaded helps nobody."""
    fake = deployments(ups=[StartError("no weights")], states=[])
    with pytest.raises(StartError, match="no weights"):
        serve(DEMO, patience_s=60)
    assert fake.done == ["down", "up", "down"]
