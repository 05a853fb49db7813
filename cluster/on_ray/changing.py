"""How a deployment becomes another one while it serves: replicas are added, removed and replaced one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.deployment.changes import Effect, changes
from cluster.deployment.settings import Settings
from cluster.errors import StartError
from cluster.on_ray.desired import DesiredState
from cluster.planning.plan import Plan, ReplicaPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Changer:
    """Every step leaves a deployment that serves, so a change may end after any of them and be taken up later."""

    desired: Callable[[], DesiredState]  # as it is after each step
    add: Callable[[Settings, Sequence[ReplicaPlan]], None]  # blocks until they serve; raises StartError
    remove: Callable[[ReplicaPlan, float], None]  # blocks for at most so many seconds while requests run there
    plan_more: Callable[[Plan, Settings, int], Plan]  # with so many replicas; raises PlanError
    plan_changed: Callable[[Plan, Settings], ReplicaPlan]  # one more, with other settings; raises PlanError

    def resize(self, number: int) -> None:
        """Make it so many replicas, of the present settings. Raises StartError."""
        settings, plan = self.desired().settings, self.desired().plan
        if number > len(plan.replicas):
            self.add(settings, self.plan_more(plan, settings, number).replicas[len(plan.replicas) :])
        while len(self.desired().plan.replicas) > number:
            self.remove(self.desired().plan.replicas[-1], settings.drain_timeout_s)

    def roll(self, settings: Settings, number: int) -> None:
        """Replace each replica that these settings change; `number`: how many there are to be in the end.

        Raises StartError; the replica whose change failed then runs as before.
        """
        old = [replica for replica in self.desired().plan.replicas if self._is_old(replica, settings)]
        while old and settings.rollout == "in_place" and len(self.desired().plan.replicas) < number:
            self._add_changed(settings)  # where there was one replica, something serves meanwhile
        for replica in old:
            if len(self.desired().plan.replicas) > number:
                self.remove(replica, settings.drain_timeout_s)
            elif settings.rollout == "surge":
                self._add_changed(settings)
                self.remove(replica, settings.drain_timeout_s)
            else:
                self._replace(replica, settings)

    def _is_old(self, replica: ReplicaPlan, settings: Settings) -> bool:
        own = self.desired().settings_of(replica.number)
        return any(change.effect is Effect.ROLLED for change in changes(own, settings))

    def _replace(self, replica: ReplicaPlan, settings: Settings) -> None:
        """On what the old one had; which comes back if that fails."""
        before = self.desired().settings_of(replica.number)
        self.remove(replica, settings.drain_timeout_s)
        try:
            self._add_changed(settings)
        except StartError:
            self.add(before, [replica])
            raise

    def _add_changed(self, settings: Settings) -> None:
        self.add(settings, [self.plan_changed(self.desired().plan, settings)])
