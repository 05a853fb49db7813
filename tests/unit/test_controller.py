"""The controller while several things happen at once. Ray's part is played by plain child processes that are fakes."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayError

from cluster.authority import Authority
from cluster.deployment.settings import ScalingSettings, Settings
from cluster.errors import StartError
from cluster.local import local_settings
from cluster.on_ray import controller as controller_module
from cluster.on_ray import desired as desired_module
from cluster.on_ray import replacing as replacing_module
from cluster.on_ray.adoption import Found, adopt
from cluster.on_ray.controller import Controller
from cluster.on_ray.desired import DesiredState, load
from cluster.on_ray.host import HostedProcess
from cluster.planning.inventory import inventory_of, machine_facts
from cluster.planning.plan import Bundle, ControlProcess, Inventory, Plan
from cluster.planning.planner import make_plan, plan_more
from cluster.process_id import PartId
from cluster.processes import vitals
from cluster.processes.child import Child, ChildProcess
from cluster.processes.rollout import process_ids
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.status import State
from echelon.pb.process_pb2 import ProcessEvent, Ready, WorkerSpec

THIS = inventory_of(machine_facts()).nodes[0]
HEAD = replace(THIS, node_id="head", num_cpus=0)
INVENTORY = Inventory(nodes=(HEAD, replace(THIS, node_id="a")), head_node_id="head")
SETTINGS = local_settings(Path(__file__).parents[2] / "models" / "demo-target")
WAIT_S = 60.0


class Places:
    """Of processes on this machine. `behaviour`: of those that are started next."""

    behaviour = "ready"

    def __init__(self, deployment: str, log_dir: Path, authority: Authority) -> None:
        self.authority = authority
        self._log_dir = log_dir
        self.ended: list[str] = []

    def reserve(self, replicas: object) -> None: ...
    def abandon(self, names: object, reason: object) -> None: ...
    def create_hosts(self, processes: object) -> None: ...
    def prepare(self, launch: Launch) -> None: ...
    def keep_spare(self, name: str, is_wanted: bool) -> None: ...
    def end_hosts(self) -> None: ...
    def end_all(self) -> None: ...

    def on_node(self, node_id: str) -> list[str]:
        return ["target-0.0", "scheduler-0"] if node_id == "a" else []

    def stands(self, part: PartId) -> bool:
        return True

    def move(self, processes: object) -> None: ...

    def spawn(self, launch: Launch) -> Child:
        env = {"FAKE_BEHAVIOUR": Places.behaviour}
        log_path = self._log_dir / launch.log_name
        return ChildProcess("tests.helpers.fake_child", WorkerSpec(), name=launch.name, log_path=log_path, env=env)

    def end(self, processes: Iterable[Bundle | ControlProcess]) -> None:
        self.ended += [process.name for process in processes]


class Nodes:
    """Of which those are lost that the test says."""

    lost: ClassVar[dict[str, str]] = {}
    latest: ClassVar["Nodes"]

    def __init__(self, used: object, on_lost: Callable[[dict[str, str]], None]) -> None:
        self.on_lost, Nodes.latest = on_lost, self

    def stop(self) -> None: ...


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    """One replica, and what follows the load."""
    monkeypatch.setattr(controller_module, "Places", Places)
    monkeypatch.setattr(controller_module, "NodeWatch", Nodes)
    monkeypatch.setattr(Nodes, "lost", {})
    monkeypatch.setattr(controller_module, "plan_for", more)
    monkeypatch.setattr(controller_module, "check_ports", lambda plan, server: None)
    monkeypatch.setattr(vitals, "_USED_LIMIT_S", 0.0)  # the gateway answers nobody
    monkeypatch.setattr(Places, "behaviour", "ready")
    settings = replace(
        SETTINGS, scaling=ScalingSettings(target_ongoing_requests=1, upscale_delay_s=0, downscale_delay_s=0)
    )
    plan = make_plan(settings, INVENTORY)
    controller = Controller(DesiredState(settings=settings, plan=plan, log_dir=tmp_path / "logs", timeout_s=WAIT_S))
    until(controller, lambda: controller.status()[1].state is not State.STARTING)
    yield controller
    controller.stop(0.0)


def more(plan: Plan, settings: Settings, number: int) -> Plan:
    return plan_more(plan, settings, INVENTORY, number)


def until(controller: Controller, holds: Callable[[], bool]) -> None:
    """Looks again whenever a process has changed."""
    for _ in range(2000):
        version, _ = controller.status()
        if holds():
            return
        controller.status(newer_than=version, timeout_s=0.05)
    pytest.fail(f"it did not happen: {controller.status()}")


def with_replicas(settings: Settings, number: int) -> Settings:
    return replace(settings, num_replicas=number, max_replicas=number, scaling=None)


def is_starting(controller: Controller, name: str) -> bool:
    return any(each.name == name and each.state is State.STARTING for each in controller.status()[1].processes)


def test_what_is_written_down_while_a_replica_starts_does_not_name_it(serving: Controller) -> None:
    """Another controller would take it for one that serves."""
    desired = serving.desired()
    Places.behaviour = "silent"
    with ThreadPoolExecutor(1) as pool:
        change = pool.submit(serving.apply, with_replicas(desired.settings, 2))
        until(serving, lambda: is_starting(serving, "target-1.0"))
        with pytest.raises(StartError, match="cannot be asked whether any still run"):
            serving.drain(0.0)
        written = load(desired.path)
        assert written is not None
        assert (written.is_drained, len(written.plan.replicas)) == (True, 1)
        serving.stop(0.0)
        with pytest.raises(StartError, match="the deployment is being taken down"):
            change.result(WAIT_S)
    assert not desired.path.exists(), "nobody writes it again"
    assert "scaler" not in [thread.name for thread in threading.enumerate()]
    for late in (lambda: serving.apply(desired.settings), serving.resume, lambda: serving.restart([])):
        with pytest.raises(StartError, match="the deployment is being taken down"):
            late()


def test_a_replica_that_cannot_be_written_down_is_ended_again(
    serving: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = serving.desired()
    num_writes = iter(range(2))

    def keep_full(desired: DesiredState) -> None:
        if next(num_writes) == 1:  # first the settings are written down, then the replica
            monkeypatch.setattr(desired_module.os, "fsync", fail)
        desired_module.save(desired)

    monkeypatch.setattr(controller_module, "save", keep_full)
    with pytest.raises(StartError, match=r"desired\.json cannot be written: .*No space left on device; free space"):
        serving.apply(with_replicas(before.settings, 2))
    monkeypatch.undo()
    assert len(serving.desired().plan.replicas) == 1
    assert [each.name for each in serving.status()[1].processes] == ["target-0.0", "scheduler-0", "gateway-0"]


def test_a_replica_that_is_gone_is_forgotten_even_if_that_cannot_be_written_down(
    serving: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(serving.desired().settings, drain_timeout_s=0.0)
    serving.apply(with_replicas(settings, 2))

    def fail_for_one(desired: DesiredState) -> None:
        if len(desired.plan.replicas) == 1:
            raise OSError(28, "No space left on device")
        desired_module.save(desired)

    monkeypatch.setattr(controller_module, "save", fail_for_one)
    with pytest.raises(StartError, match=r"desired\.json cannot be written"):
        serving.apply(with_replicas(settings, 1))
    monkeypatch.setattr(controller_module, "save", desired_module.save)
    serving.apply(with_replicas(settings, 1))
    written = load(serving.desired().path)
    assert written is not None
    assert [replica.number for replica in written.plan.replicas] == [0]
    assert [each.name for each in serving.status()[1].processes] == ["target-0.0", "scheduler-0", "gateway-0"]


def test_what_ran_on_a_lost_node_says_so_until_there_is_another(
    serving: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Inventory(nodes=(HEAD,), head_node_id="head")
    monkeypatch.setattr(replacing_module, "ray_inventory", lambda settings, without: left)
    Nodes.lost = {"a": "node a is lost"}
    Nodes.latest.on_lost(Nodes.lost)
    until(serving, lambda: "target-0.0: node a is lost; no place for target" in serving.status()[1].reason)
    assert serving.status()[1].state is State.RECOVERING
    left = Inventory(nodes=(HEAD, replace(THIS, node_id="b")), head_node_id="head")
    until(serving, lambda: serving.status()[1].state is State.READY)
    written = load(serving.desired().path)
    assert written is not None
    places = {process.name: process.node_id for process in written.plan.processes}
    assert places == {"target-0.0": "b", "scheduler-0": "b", "gateway-0": "head"}


class SilentHost:
    """Answers nothing until the test ends, and is gone then."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.watch = self.stop = self.stderr_tail = self

    def remote(self, *_: object) -> Any:
        self.ended.wait(WAIT_S)
        raise RayError("it is gone")


def test_the_next_controller_starts_what_was_being_started_again() -> None:
    plan, host = make_plan(SETTINGS, INVENTORY), SilentHost()

    def found(launch_number: int, *events: ProcessEvent) -> Found:
        hosted = HostedProcess(
            pid=1, gpu_ids=(), node_id="", host_name="", launch_number=launch_number, incarnation=1, events=events
        )
        return Found(host=host, process=hosted, teller="")

    processes = ProcessSet(lambda launch: pytest.fail("nothing is started here"))
    processes.expect(process_ids(plan))
    ready = ProcessEvent(ready=Ready(address="127.0.0.1:1"))
    adopt(plan, processes, {"scheduler-0": found(1, ready), "gateway-0": found(1, ready), "target-0.0": found(2)})
    error = processes.read(lambda board: board.process("target-0.0").error)
    assert error == "it was being started when the controller was lost"
    assert processes.read(lambda board: board.process("scheduler-0").state) is State.READY
    host.ended.set()
    processes.stop(0.0)
