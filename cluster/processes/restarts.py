"""Start a part of a deployment that serves again, beside what runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.deployment.settings import Role
from cluster.planning.plan import GatewayPlan, Plan, ReplicaPlan
from cluster.process_id import PartId
from cluster.processes.rollout import group_launch, launch_gateway, start_scheduler, wait_gateway
from cluster.processes.startup import ProcessSet
from cluster.processes.telling import ToldGateways
from cluster.processes.whereabouts import Whereabouts
from cluster.processes.worker_group import start_groups
from echelon.pb import process_pb2

# The plan that a part follows from now on, if its former place is gone; None: it is still there. Raises PlanError if
# there is no other.
Replan = Callable[[PartId], ReplicaPlan | GatewayPlan | None]


def stay(part: PartId) -> None:
    """On a single machine, no place is lost but with everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """Whoever asks for a restart has ended the part's processes."""

    plan: Plan
    processes: ProcessSet
    whereabouts: Whereabouts
    told: ToldGateways
    on_start: Callable[[str], None]  # a process that answers questions was started again
    replan: Replan

    def start(self, part: PartId, names: Sequence[str], deadline: float) -> None:
        """Block until it is ready. `names`: its processes. Raises StartError; PlanError if it has no place."""
        if (plan := self.replan(part)) is not None:
            self.whereabouts.plan_again(plan)
        self.processes.clear(names)
        if part.role == "scheduler":
            self._start_scheduler(part, names, deadline)
        elif part.role == "gateway":
            self._start_gateway(part, names, deadline)
        else:
            self._start_group(part, deadline)

    def _start_group(self, part: PartId, deadline: float) -> None:
        """On the devices of the plan, as a new incarnation."""
        replica, running = self.whereabouts.replica(part.replica)
        role: Role = "target" if part.role == "target" else "draft"
        old = running.target if role == "target" else running.draft
        assert old is not None, "a group that was lost has run"
        launch = group_launch(running.settings, replica.group(role), old.incarnation + 1)
        (group,) = start_groups(self.processes, [launch], deadline, within=launch.names)
        self.whereabouts.move(part.replica, **{role: group})

    def _start_scheduler(self, part: PartId, names: Sequence[str], deadline: float) -> None:
        """The groups keep running; it takes over their engines."""
        replica, running = self.whereabouts.replica(part.replica)
        address = start_scheduler(
            running.settings,
            replica.scheduler,
            self.processes,
            running.target,
            running.draft,
            deadline=deadline,
            within=names,
        )
        self.on_start(names[0])
        self.whereabouts.move(part.replica, scheduler_address=address)
        self.told.tell(part.replica, process_pb2.SchedulerUpdate(address=address))

    def _start_gateway(self, part: PartId, names: Sequence[str], deadline: float) -> None:
        """On the same ports. Its spec names replicas of one model; of others it hears as others did when they came."""
        gateway = self.whereabouts.gateways[part]

        def launch(replicas: Sequence[int]) -> None:
            alike = self.whereabouts.alike(replicas)
            launch_gateway(
                alike[0].settings,
                replace(self.plan, replicas=self.whereabouts.plans, gateways=tuple(self.whereabouts.gateways.values())),
                gateway,
                self.processes,
                scheduler_addresses=[replica.scheduler_address for replica in alike],
                grpc_port=int(self.whereabouts.gateway_addresses[part].rpartition(":")[2]),
            )

        self.told.launch_gateway(launch, self.whereabouts.news_of)
        self.whereabouts.move_gateway(part, wait_gateway(gateway, self.processes, deadline, within=names))
        self.on_start(names[0])
