"""Where each replica and each gateway of a deployment is now."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from cluster.planning.plan import GatewayPlan, Plan, ReplicaPlan
from cluster.process_id import PartId
from cluster.processes.rollout import RunningDeployment, RunningReplica
from cluster.processes.specs import gateway_model, model_id
from cluster.processes.startup import ProcessSet
from cluster.processes.telling import tell_of_groups
from echelon.pb import process_pb2


class Whereabouts:
    """Replicas come and go, and parts of them move when they are started again. Thread-safe.

    Schedulers are told in the order in which groups have moved, whichever threads start them.
    """

    def __init__(self, plan: Plan, processes: ProcessSet, running: RunningDeployment) -> None:
        self._processes = processes
        self._lock = threading.RLock()
        self._plans = {replica.number: replica for replica in plan.replicas}
        self._running = dict(zip(self._plans, running.replicas, strict=True))
        gateways = {gateway.process.id.part: gateway for gateway in plan.gateways}
        self.gateways: dict[PartId, GatewayPlan] = gateways if running.gateway_addresses else {}
        self.gateway_addresses = dict(zip(self.gateways, running.gateway_addresses, strict=True))

    @property
    def running(self) -> RunningDeployment:
        with self._lock:
            replicas = tuple(self._running.values())
        return RunningDeployment(replicas=replicas, gateway_addresses=tuple(self.gateway_addresses.values()))

    @property
    def plans(self) -> tuple[ReplicaPlan, ...]:
        with self._lock:
            return tuple(self._plans.values())

    def add(self, replica: ReplicaPlan, running: RunningReplica) -> None:
        with self._lock:
            self._plans[replica.number], self._running[replica.number] = replica, running

    def remove(self, number: int) -> None:
        with self._lock:
            del self._plans[number], self._running[number]

    def plan_again(self, plan: ReplicaPlan | GatewayPlan) -> None:
        """A part of it has, or will have, another place."""
        with self._lock:
            if isinstance(plan, GatewayPlan):
                self.gateways[plan.process.id.part] = plan
            else:
                self._plans[plan.number] = plan

    def move_gateway(self, part: PartId, address: str) -> None:
        with self._lock:
            self.gateway_addresses[part] = address

    def replica(self, number: int) -> tuple[ReplicaPlan, RunningReplica]:
        with self._lock:
            return self._plans[number], self._running[number]

    def news_of(self, number: int) -> process_pb2.SchedulerUpdate | None:
        """What gateways are told of a replica; None: its scheduler's address is not known."""
        with self._lock:
            running = self._running.get(number)
        if running is None or not running.scheduler_address:
            return None
        model = gateway_model(running.settings)
        return process_pb2.SchedulerUpdate(address=running.scheduler_address, model=model)

    def is_last_of_its_model(self, number: int) -> bool:
        return not self.others_of_its_model(number)

    def others_of_its_model(self, number: int) -> list[ReplicaPlan]:
        with self._lock:
            models = {other: model_id(running.settings) for other, running in self._running.items()}
            return [self._plans[other] for other in models if other != number and models[other] == models[number]]

    def alike(self, numbers: Sequence[int]) -> list[RunningReplica]:
        """The first of these replicas, as far as they serve the same model."""
        with self._lock:
            running = [self._running[number] for number in numbers]
        first = model_id(running[0].settings)
        return list(takewhile(lambda each: model_id(each.settings) == first, running))

    def move(self, number: int, **moved: Any) -> None:
        """These parts of a running replica are elsewhere now; its scheduler hears where its groups are."""
        with self._lock:
            self._running[number] = replace(self._running[number], **moved)
            self.tell_of_groups(number)

    def tell_of_groups(self, number: int) -> None:
        with self._lock:
            replica, running = self._plans[number], self._running[number]
            if running.target.address and (running.draft is None or running.draft.address):
                tell_of_groups(self._processes, replica, running)
