"""Gateways count replicas in the order in which they came, whatever their numbers are."""

from collections.abc import Callable
from typing import cast

from cluster.processes.startup import ProcessSet
from cluster.processes.telling import ToldGateways
from echelon.pb.process_pb2 import ProcessUpdate, SchedulerUpdate


class Processes:
    def __init__(self) -> None:
        self.told: list[tuple[str, int, str | None]] = []

    def tell(self, name: str, update: ProcessUpdate) -> None:
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
