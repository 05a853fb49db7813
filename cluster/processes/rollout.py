"""Bring a planned deployment up in order: worker groups, then the scheduler, then the gateway."""

import logging
import time
from dataclasses import dataclass

from childproc.ports import try_bind
from cluster.deployment.settings import Settings
from cluster.errors import StartError
from cluster.planning.plan import Plan
from cluster.process_id import ProcessId
from cluster.processes.specs import gateway_spec, scheduler_spec, worker_specs
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.worker_group import GroupLaunch, RunningGroup, start_groups

logger = logging.getLogger(__name__)

_SCHEDULER_MODULE = "scheduler"
_GATEWAY_MODULE = "gateway"
_FIRST_INCARNATION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDeployment:
    target: RunningGroup
    draft: RunningGroup | None  # None: no draft model, or it lives in the target's processes
    scheduler_address: str
    gateway_address: str  # empty: started without a gateway


def process_ids(plan: Plan, *, gateway: bool = True) -> list[ProcessId]:
    """Every process of a plan, in the order in which they start."""
    workers_and_scheduler = [bundle.id for bundle in plan.bundles] + [plan.scheduler.id]
    return workers_and_scheduler + [plan.gateway.id] if gateway else workers_and_scheduler


def stop_order(plan: Plan) -> list[str]:
    """The gateway stops first, so that nothing is asked of processes that are already gone."""
    return [plan.gateway.name, plan.scheduler.name]


def roll_out(
    settings: Settings, plan: Plan, processes: ProcessSet, *, timeout_s: float, gateway: bool = True
) -> RunningDeployment:
    """Start everything and block until it serves. Raises StartError; the caller then stops `processes`."""
    deadline = time.monotonic() + timeout_s
    processes.expect(process_ids(plan, gateway=gateway))
    groups = [
        GroupLaunch(
            role=bundles[0].group,
            replica=bundles[0].replica,
            specs=worker_specs(settings, bundles, _FIRST_INCARNATION),
            bundles=bundles,
        )
        for bundles in (plan.group("target"), plan.group("draft"))
        if bundles
    ]
    target, *drafts = start_groups(processes, groups, deadline)
    draft = drafts[0] if drafts else None
    scheduler_address = _start_scheduler(settings, plan, processes, target, draft, deadline=deadline)
    gateway_address = _start_gateway(settings, plan, processes, scheduler_address, deadline) if gateway else ""
    processes.all_ready()
    return RunningDeployment(
        target=target, draft=draft, scheduler_address=scheduler_address, gateway_address=gateway_address
    )


def check_port(host: str, port: int, key: str) -> None:
    """Raise StartError if nobody could listen there: better now than after ten minutes of loading."""
    try:
        try_bind(host, port)
    except OSError as err:
        reason = err.strerror or str(err)
        raise StartError(
            f"{key} {port} on {host} cannot be used: {reason}; stop what listens there or choose another {key}"
        ) from err


def _start_scheduler(
    settings: Settings,
    plan: Plan,
    processes: ProcessSet,
    target: RunningGroup,
    draft: RunningGroup | None,
    *,
    deadline: float,
) -> str:
    draft_group = target if settings.colocated else draft
    spec = scheduler_spec(
        settings,
        process=plan.scheduler,
        target=target.endpoint,
        draft=None if draft_group is None else draft_group.endpoint,
    )
    name = plan.scheduler.name
    processes.launch(Launch(id=plan.scheduler.id, module=_SCHEDULER_MODULE, spec=spec, node=plan.scheduler.address))
    processes.wait_ready([name], deadline)
    return processes.read(lambda board: board.process(name).address)


def _start_gateway(
    settings: Settings, plan: Plan, processes: ProcessSet, scheduler_address: str, deadline: float
) -> str:
    name = plan.gateway.name
    spec = gateway_spec(settings, plan.gateway, scheduler_addresses=[scheduler_address])
    processes.launch(Launch(id=plan.gateway.id, module=_GATEWAY_MODULE, spec=spec, node=plan.gateway.address))
    processes.wait_ready([name], deadline)
    return processes.read(lambda board: board.process(name).address)
