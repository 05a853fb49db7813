"""A part whose node is lost gets another place: on what is left, or on what has come since."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.deployment.settings import Settings
from cluster.errors import PlanError
from cluster.on_ray.cluster import ray_inventory
from cluster.on_ray.desired import DesiredState
from cluster.on_ray.places import Places
from cluster.planning.plan import Bundle, ControlProcess, GatewayPlan, Inventory, ReplicaPlan
from cluster.planning.replanning import (
    plan_gateway_again,
    plan_group_again,
    plan_scheduler_again,
    replica_of,
    with_freed,
    with_gateway,
    with_replica,
)
from cluster.process_id import PartId
from cluster.processes.startup import ProcessSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacer:
    """One part at a time, so that two never count on the same device."""

    places: Places
    processes: ProcessSet
    desired: Callable[[], DesiredState]
    keep: Callable[[Callable[[DesiredState], DesiredState]], None]  # for the next controller; raises StartError
    lost_nodes: Callable[[], Mapping[str, str]]  # why, by id
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _displaced: dict[PartId, str] = field(init=False, default_factory=dict)  # parts that have lost their place, and why

    def replan(self, part: PartId) -> ReplicaPlan | GatewayPlan | None:
        """The plan that a part follows from now on; None: the former one. Raises StartError; PlanError if there is no
        place for it."""
        with self._lock:
            if part.role == "gateway":
                return self._replan_gateway(part)
            if part.role == "scheduler":
                return self._replan_scheduler(part)
            return self._replan_group(part)

    def _replan_gateway(self, part: PartId) -> GatewayPlan | None:
        plan = self.desired().plan
        before = next(gateway for gateway in plan.gateways if gateway.process.id.part == part)
        if not (why := self._why_displaced([before.process])):
            return None
        settings = self.desired().settings
        try:
            after = plan_gateway_again(plan, part, settings, self._inventory(settings))
        except PlanError as err:
            raise PlanError(f"{why}; {err}") from err
        self.places.move([after.process])
        self.keep(lambda desired: desired.with_plan(with_gateway(desired.plan, after)))
        return after

    def _replan_scheduler(self, part: PartId) -> ReplicaPlan | None:
        plan = self.desired().plan
        if not self._why_displaced([replica_of(plan, part).scheduler]):
            return None
        after = plan_scheduler_again(plan, part)
        self.places.move([after.scheduler])
        self._keep_replica(after)
        return after

    def _replan_group(self, part: PartId) -> ReplicaPlan | None:
        replica = replica_of(self.desired().plan, part)
        group = _of(part, replica)
        why = self._why_displaced(group)
        if not why and self.places.stands(part):
            return None
        why = self._displaced[part] = why or self._displaced.get(part, "its devices were given back")
        target = PartId(role="target", replica=part.replica)
        if part.role == "draft" and target in self._displaced:
            self.places.end(group)
            raise PlanError(f"{why}; {target.name} comes first")
        try:
            after = self._plan_group(part, group, why)
            self.places.move(_of(part, after))
        except PlanError as err:
            self.places.end(group)
            raise PlanError(f"{why}; {err}") from err
        self._keep_replica(after)
        del self._displaced[part]
        return after

    def _plan_group(self, part: PartId, group: Sequence[Bundle], why: str) -> ReplicaPlan:
        plan, settings = self.desired().plan, self.desired().settings_of(part.replica)
        inventory = self._inventory(settings)
        if self.places.stands(part):  # its processes have ended, but it still has the devices that are left of it
            inventory = with_freed(inventory, group)
        try:
            after = plan_group_again(plan, part, settings, inventory)
        except PlanError:
            draft = PartId(role="draft", replica=part.replica)
            held = _of(draft, replica_of(plan, part))
            if part == draft or not self.places.stands(draft) or self._why_displaced(held):
                raise
            after = plan_group_again(plan, part, settings, with_freed(inventory, held))
            self._end_draft(draft, held, f"its devices are needed for {part.name}, because {why}")
        return after

    def _end_draft(self, part: PartId, group: Iterable[Bundle], why: str) -> None:
        """Its target goes on without drafts, until there is another place for it."""
        self._displaced[part] = why
        self.processes.fail([bundle.name for bundle in group], why)
        self.places.end(group)

    def _why_displaced(self, processes: Iterable[Bundle | ControlProcess]) -> str:
        """Empty: no node of these is lost."""
        lost = self.lost_nodes()
        return ", ".join(dict.fromkeys(lost[process.node_id] for process in processes if process.node_id in lost))

    def _inventory(self, settings: Settings) -> Inventory:
        return ray_inventory(settings, without=self.lost_nodes())

    def _keep_replica(self, after: ReplicaPlan) -> None:
        self.keep(lambda desired: desired.with_plan(with_replica(desired.plan, after)))


def _of(part: PartId, replica: ReplicaPlan) -> list[Bundle]:
    return [bundle for bundle in replica.bundles if bundle.id.part == part]
