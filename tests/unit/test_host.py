"""What the controller tells a process arrives in the order in which it was told."""

from itertools import permutations

from cluster.on_ray.host import InOrder
from echelon.pb.process_pb2 import ProcessUpdate, SchedulerUpdate

UPDATES = [ProcessUpdate(scheduler=SchedulerUpdate(replica=number)) for number in range(4)]


def test_updates_are_passed_on_in_order_whatever_order_they_come_in() -> None:
    for order in permutations(range(4)):
        told: list[ProcessUpdate] = []
        in_order = InOrder("controller", told.append)
        for number in order:
            in_order.take("controller", number, UPDATES[number])
        assert told == UPDATES


def test_what_comes_late_from_a_controller_that_was_lost_does_not_mix_with_what_the_next_one_says() -> None:
    told: list[ProcessUpdate] = []
    in_order = InOrder("the next one", told.append)
    in_order.take("the lost one", 0, UPDATES[3])
    for number in (1, 0):
        in_order.take("the next one", number, UPDATES[number])
    assert told == UPDATES[:2]
