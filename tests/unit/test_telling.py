"""Gateways count replicas in the order in which they came, whatever their numbers are."""

import threading
from collections.abc import Callable
from typing import cast

from cluster.processes.startup import ProcessSet
from cluster.processes.telling import ToldGateways
from echelon.pb.process_pb2 import ProcessUpdate, SchedulerUpdate, SparesUpdate


class Processes:
    def __init__(self) -> None:
        self.told: list[tuple[str, int, str | None]] = []

    def tell(self, name: str, update: ProcessUpdate) -> None:
        if update.HasField("scheduler"):
            self.told.append((name, update.scheduler.replica, update.scheduler.WhichOneof("state")))


def told(make: Callable[[ToldGateways], None]) -> list[tuple[str, int, str | None]]:
    processes = Processes()
    make(ToldGateways(cast("ProcessSet", processes), ["gateway-0"], [0, 1]))
    return processes.told


def test_a_replica_that_comes_is_the_last_and_those_after_one_that_goes_move_up() -> None:
    def surge(gateways: ToldGateways) -> None:
        gateways.add(2, SchedulerUpdate(address="2"))
        gateways.remove(0)
        gateways.add(0, SchedulerUpdate(address="0"))
        gateways.tell(1, SchedulerUpdate(retiring=True))

    assert told(surge) == [
        ("gateway-0", 2, "address"),
        ("gateway-0", 0, "removed"),
        ("gateway-0", 2, "address"),
        ("gateway-0", 0, "retiring"),
    ]


def test_nothing_is_said_of_a_replica_that_has_gone() -> None:
    def late(gateways: ToldGateways) -> None:
        gateways.remove(1)
        gateways.tell(1, SchedulerUpdate(address="too late"))

    assert told(late) == [("gateway-0", 1, "removed")]


def test_a_replica_that_is_about_to_go_gets_no_requests_when_a_drain_ends() -> None:
    def resume(gateways: ToldGateways) -> None:
        gateways.retire(0)
        gateways.drain(True)
        gateways.drain(False)

    def comes_late(gateways: ToldGateways) -> None:
        gateways.drain(True)
        gateways.add(2, SchedulerUpdate(address="2"))

    assert retiring_after(resume) == {0: True, 1: False}
    assert retiring_after(comes_late) == {0: True, 1: True, 2: True}


def retiring_after(make: Callable[[ToldGateways], None]) -> dict[int, bool]:
    """By place, as a gateway knows it."""
    seen: dict[int, bool] = {}

    class Gateway:
        def tell(self, name: str, update: ProcessUpdate) -> None:
            if update.scheduler.WhichOneof("state") == "retiring":
                seen[update.scheduler.replica] = update.scheduler.retiring

    make(ToldGateways(cast("ProcessSet", Gateway()), ["gateway-0"], [0, 1]))
    return seen


def test_news_of_a_replica_are_not_taken_for_another_while_one_goes() -> None:
    """A part is started again, in a thread of its own, just when those after it move up."""
    told: list[tuple[int, str | None]] = []

    class Gateway:
        def tell(self, name: str, update: ProcessUpdate) -> None:
            told.append((update.scheduler.replica, update.scheduler.WhichOneof("state")))
            if update.scheduler.removed:
                late.start()
                late.join(0.2)  # where nothing holds it up, it says its news now

    gateways = ToldGateways(cast("ProcessSet", Gateway()), ["gateway-0"], [0, 1])
    late = threading.Thread(target=gateways.tell, args=(1, SchedulerUpdate(address="1")))
    gateways.remove(0)
    late.join()
    assert told == [(0, "removed"), (0, "address")]


def test_a_gateway_that_was_started_again_hears_all_that_it_missed() -> None:
    def again(gateways: ToldGateways) -> None:
        gateways.retire(1)
        gateways.launch_gateway(started.append, lambda replica: SchedulerUpdate(address=f"at {replica}"))

    started: list[object] = []
    assert told(again)[1:] == [
        ("gateway-0", 0, "address"),
        ("gateway-0", 0, "retiring"),
        ("gateway-0", 1, "address"),
        ("gateway-0", 1, "retiring"),
    ]
    assert started == [(0, 1)]


class EarOfGateway:
    def __init__(self) -> None:
        self.spares: list[int] = []

    def tell(self, name: str, update: ProcessUpdate) -> None:
        if update.HasField("spares"):
            self.spares.append(update.spares.num_ready)


def test_gateways_hear_of_spares_when_their_number_changes_and_when_they_are_started_again() -> None:
    ear = EarOfGateway()
    gateways = ToldGateways(cast("ProcessSet", ear), ["gateway-0"], [0])
    gateways.tell_of_spares(SparesUpdate(num_ready=1, num_wanted=2))
    gateways.tell_of_spares(SparesUpdate(num_ready=1, num_wanted=2))
    gateways.tell_of_spares(SparesUpdate(num_ready=2, num_wanted=2))
    assert ear.spares == [1, 2]
    gateways.launch_gateway(lambda replicas: None, lambda number: None)
    assert ear.spares == [1, 2, 2]
