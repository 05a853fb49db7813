"""What a replica without a place runs goes on at the others."""

from collections.abc import Callable

from cluster.planning.plan import ReplicaPlan
from cluster.process_id import PartId
from cluster.processes.startup import ProcessSet
from cluster.processes.telling import ToldGateways
from cluster.processes.whereabouts import Whereabouts
from echelon.pb import process_pb2


class Handover:
    """`begin` and `end` are called by the thread that starts the target of the replica."""

    def __init__(
        self,
        processes: ProcessSet,
        whereabouts: Whereabouts,
        told: ToldGateways,
        is_up: Callable[[PartId], bool],
    ) -> None:
        self._processes, self._whereabouts, self._told, self._is_up = processes, whereabouts, told, is_up
        self._handed_over: set[int] = set()

    def begin(self, number: int, reason: str) -> None:
        """Its target has no place. Idempotent; nothing where no other replica serves: then its requests wait."""
        others = self._whereabouts.others_of_its_model(number)
        if number in self._handed_over or not any(map(self._serves, others)):
            return
        self._handed_over.add(number)
        scheduler = self._whereabouts.replica(number)[0].scheduler
        self._told.tell(number, process_pb2.SchedulerUpdate(given_up=reason))
        if self._is_up(scheduler.id.part):  # it ends, and comes back with the target
            self._processes.clear([scheduler.name])
            self._processes.fail([scheduler.name], "its target has no place")

    def end(self, number: int) -> None:
        """Its target is up again: its scheduler is next, and takes requests."""
        self._handed_over.discard(number)

    def _serves(self, replica: ReplicaPlan) -> bool:
        return all(self._is_up(part) for scheduler, needed in replica.needs.items() for part in (scheduler, *needed))
