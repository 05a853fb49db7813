"""What schedulers are told of their groups, and gateways of schedulers."""

from collections.abc import Iterable, Sequence

from cluster.planning.plan import ReplicaPlan
from cluster.processes.rollout import RunningReplica
from cluster.processes.specs import ENGINE_ROLES
from cluster.processes.startup import ProcessSet
from echelon.pb import process_pb2


class ToldGateways:
    """Gateways count replicas in the order in which they came, those that went left out."""

    def __init__(self, processes: ProcessSet, gateways: Sequence[str], replicas: Iterable[int]) -> None:
        """`gateways`: their processes; `replicas`: the numbers of those that gateways know, in their order."""
        self._processes = processes
        self.gateways = gateways
        self.replicas = tuple(replicas)

    def add(self, replica: int, news: process_pb2.SchedulerUpdate) -> None:
        self.replicas = (*self.replicas, replica)
        self.tell(replica, news)

    def remove(self, replica: int) -> None:
        self.tell(replica, process_pb2.SchedulerUpdate(removed=True))
        self.replicas = tuple(other for other in self.replicas if other != replica)

    def retire_all(self, retiring: bool) -> None:
        for replica in self.replicas:
            self.tell(replica, process_pb2.SchedulerUpdate(retiring=retiring))

    def tell(self, replica: int, news: process_pb2.SchedulerUpdate) -> None:
        if replica not in self.replicas:
            return  # it was removed while a part of it was started again
        news.replica = self.replicas.index(replica)
        for gateway in self.gateways:
            self._processes.tell(gateway, process_pb2.ProcessUpdate(scheduler=news))


def tell_of_groups(processes: ProcessSet, replica: ReplicaPlan, running: RunningReplica) -> None:
    """Where the groups of a replica are now; its scheduler knows what has not changed."""
    endpoints = dict.fromkeys(replica.group("target")[0].engines, running.target.endpoint)
    if running.draft is not None:
        endpoints["draft"] = running.draft.endpoint
    for engine, endpoint in endpoints.items():
        tell_scheduler(processes, replica, process_pb2.GroupUpdate(role=ENGINE_ROLES[engine], endpoint=endpoint))


def tell_scheduler(processes: ProcessSet, replica: ReplicaPlan, news: process_pb2.GroupUpdate) -> None:
    processes.tell(replica.scheduler.name, process_pb2.ProcessUpdate(group=news))
