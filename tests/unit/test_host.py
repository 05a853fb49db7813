"""What the controller tells a process arrives in the order in which it was told, and it hears all that one says."""

import threading
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import pytest

from cluster.on_ray import host as host_module
from cluster.on_ray.host import InOrder, ProcessHost
from cluster.process_id import ProcessId
from cluster.processes import spares
from cluster.processes.startup import Launch
from echelon.pb.process_pb2 import ProcessEvent, ProcessUpdate, Ready, SchedulerUpdate, WorkerSpec

UPDATES = [ProcessUpdate(scheduler=SchedulerUpdate(replica=number)) for number in range(4)]
LAUNCH = Launch(id=ProcessId(role="target", rank=0), module="workers", spec=WorkerSpec())
READY = ProcessEvent(ready=Ready(address="127.0.0.1:1"))


def test_updates_are_passed_on_in_order_whatever_order_they_come_in() -> None:
    for order in permutations(range(4)):
        told: list[ProcessUpdate] = []
        in_order = InOrder()
        in_order.begin("controller", told.append)
        for number in order:
            in_order.take("controller", number, UPDATES[number])
        assert told == UPDATES


def test_what_comes_late_from_a_controller_that_was_lost_does_not_mix_with_what_the_next_one_says() -> None:
    told: list[ProcessUpdate] = []
    in_order = InOrder()
    in_order.begin("the lost one", told.append)
    in_order.begin("the next one", told.append)
    in_order.take("the lost one", 0, UPDATES[3])
    for number in (1, 0):
        in_order.take("the next one", number, UPDATES[number])
    assert told == UPDATES[:2]


def test_what_a_process_is_told_before_it_has_started_waits_for_that() -> None:
    told: list[ProcessUpdate] = []
    in_order = InOrder()
    in_order.begin("before", lambda _: pytest.fail("the process before it hears nothing of that"))
    in_order.take("now", 0, UPDATES[0])
    in_order.begin("now", told.append)
    in_order.take("now", 1, UPDATES[1])
    assert told == UPDATES[:2]


class Child:
    """Says what the test lets it say."""

    started: ClassVar["list[Child]"] = []

    def __init__(self, *_: object, **__: object) -> None:
        Child.started.append(self)
        self.pid = 1
        self.is_asked = threading.Event()
        self.may_say = threading.Event()

    def poll(self) -> None:
        return None

    def next_event(self, timeout_s: float) -> ProcessEvent | None:
        self.is_asked.set()
        return READY if self.may_say.wait(timeout_s) else None

    def tell(self, update: ProcessUpdate) -> None: ...


class Context:
    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {}

    def get_node_id(self) -> str:
        return "node"

    def get_actor_name(self) -> str:
        return "host"


def test_what_a_process_says_to_a_controller_that_was_lost_the_next_one_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "ChildProcess", Child)
    monkeypatch.setattr(host_module.ray, "get_runtime_context", Context)
    host = ProcessHost()
    host.start(LAUNCH, Path("logs"), "lost")
    child = Child.started.pop()
    lost = threading.Thread(target=host.watch, args=("lost", 30.0))
    lost.start()
    assert child.is_asked.wait(30)
    taken_over = host.take_over("next")
    assert taken_over is not None
    assert taken_over.events == ()
    child.may_say.set()
    lost.join()
    child.may_say.clear()
    assert host.watch("next", 0.0) == (None, READY)
    assert host.watch("next", 0.0) == (None, None), "once"


def test_a_preparation_that_comes_after_its_start_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "ChildProcess", Child)
    monkeypatch.setattr(host_module.ray, "get_runtime_context", Context)
    host = ProcessHost()
    host.start(LAUNCH, Path("logs"), "controller")
    host.prepare(LAUNCH, Path("logs"))
    assert len(Child.started) == 1
    host.prepare(replace(LAUNCH, number=2), Path("logs"))
    assert len(Child.started) == 2
    Child.started.clear()
