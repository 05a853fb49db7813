"""What schedulers are told of their groups, and gateways of schedulers."""

import threading
from collections.abc import Callable, Iterable, Sequence

from cluster.planning.plan import ReplicaPlan
from cluster.processes.rollout import RunningReplica
from cluster.processes.specs import ENGINE_ROLES
from cluster.processes.startup import ProcessSet
from echelon.pb import process_pb2

# Where the scheduler of a replica is, and what it serves; None: not known.
NewsOf = Callable[[int], process_pb2.SchedulerUpdate | None]


class ToldGateways:
    """Gateways count replicas in the order in which they came, those that went left out. Thread-safe: replicas come and
    go while parts of others are started again."""

    def __init__(self, processes: ProcessSet, gateways: Sequence[str], replicas: Iterable[int]) -> None:
        """`gateways`: their processes; `replicas`: the numbers of those that gateways know, in their order."""
        self._processes = processes
        self.gateways = gateways
        self._lock = threading.RLock()
        self._replicas = list(replicas)
        self._retiring: set[int] = set()
        self.is_drained = False  # no replica gets new requests
        self._spares = process_pb2.SparesUpdate()

    def add(self, replica: int, news: process_pb2.SchedulerUpdate) -> None:
        with self._lock:
            self._replicas.append(replica)
            self.tell(replica, news)
            if self.is_drained:
                self._tell_whether_retiring(replica)

    def remove(self, replica: int) -> None:
        with self._lock:
            self.tell(replica, process_pb2.SchedulerUpdate(removed=True))
            self._replicas.remove(replica)
            self._retiring.discard(replica)

    def retire(self, replica: int) -> None:
        """It gets no new requests any more."""
        with self._lock:
            self._retiring.add(replica)
            self._tell_whether_retiring(replica)

    def drain(self, is_drained: bool) -> None:
        """No replica gets new requests, or all but those that retire get them again."""
        with self._lock:
            self.is_drained = is_drained
            for replica in self._replicas:
                self._tell_whether_retiring(replica)

    def tell(self, replica: int, news: process_pb2.SchedulerUpdate) -> None:
        with self._lock:
            if replica not in self._replicas:
                return  # it was removed while a part of it was started again
            news.replica = self._replicas.index(replica)
            for gateway in self.gateways:
                self._processes.tell(gateway, process_pb2.ProcessUpdate(scheduler=news))

    def tell_of_spares(self, spares: process_pb2.SparesUpdate) -> None:
        """Gateways count them in their metrics."""
        with self._lock:
            if spares != self._spares:
                self._spares = spares
                self._repeat_spares()

    def launch_gateway(self, launch: Callable[[Sequence[int]], None], news_of: NewsOf) -> None:
        """Start a gateway with the replicas that there are, in their order: whatever changes next, it is told."""
        with self._lock:
            launch(tuple(self._replicas))
            self.repeat(news_of)

    def repeat(self, news_of: NewsOf) -> None:
        """All that a gateway may have missed."""
        with self._lock:
            for replica in self._replicas:
                if (news := news_of(replica)) is not None:
                    self.tell(replica, news)
                self._tell_whether_retiring(replica)
            self._repeat_spares()

    def _repeat_spares(self) -> None:
        for gateway in self.gateways:
            self._processes.tell(gateway, process_pb2.ProcessUpdate(spares=self._spares))

    def _tell_whether_retiring(self, replica: int) -> None:
        is_retiring = self.is_drained or replica in self._retiring
        self.tell(replica, process_pb2.SchedulerUpdate(retiring=is_retiring))


def tell_of_groups(processes: ProcessSet, replica: ReplicaPlan, running: RunningReplica) -> None:
    """Where the groups of a replica are now; its scheduler knows what has not changed."""
    endpoints = dict.fromkeys(replica.group("target")[0].engines, running.target.endpoint)
    if running.draft is not None:
        endpoints["draft"] = running.draft.endpoint
    for engine, endpoint in endpoints.items():
        tell_scheduler(processes, replica, process_pb2.GroupUpdate(role=ENGINE_ROLES[engine], endpoint=endpoint))


def tell_scheduler(processes: ProcessSet, replica: ReplicaPlan, news: process_pb2.GroupUpdate) -> None:
    processes.tell(replica.scheduler.name, process_pb2.ProcessUpdate(group=news))
