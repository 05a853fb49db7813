"""The half of `cluster.lifecycle` that talks to Ray."""

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.deployment.settings import Settings
from cluster.errors import StartError
from cluster.on_ray.cluster import connected, plan_now, remnants, remove_groups
from cluster.on_ray.controller import DesiredState, create_controller, find_controller
from cluster.planning.plan import Plan
from cluster.processes.status import DeploymentStatus, ProcessStatus, State
from cluster.state_dir import Record, folder_of

logger = logging.getLogger(__name__)

_LONG_POLL_S = 1.0
_ANSWER_TIMEOUT_S = 30.0
_LAUNCH_MARGIN_S = 60.0  # for the controller itself to come up and to report that it gave up
_NUM_GRACES = 3  # gateway, scheduler and workers stop one after the other, and each has the grace
_GONE_TIMEOUT_S = 30.0
_POLL_S = 0.1


def plan_on(settings: Settings, ray_address: str) -> Plan:
    """A plan for the cluster as it is now."""
    with connected(ray_address):
        return plan_now(settings)


def deploy(
    record: Record,
    settings: Settings,
    *,
    on_plan: Callable[[Plan], None],
    on_change: Callable[[ProcessStatus], None],
) -> DeploymentStatus:
    """Plan, create the controller and follow it until the deployment serves. The caller cleans up after an error."""
    with connected(record.ray_address, token=record.token):
        if find_controller(settings.name) is not None:
            raise StartError(
                f"the Ray at {record.ray_address} runs a deployment {settings.name!r} that was started elsewhere; "
                "choose another name"
            )
        plan = plan_now(settings)
        on_plan(plan)
        log_dir = folder_of(settings.name) / "logs"
        timeout_s = settings.startup_timeout_s
        desired = DesiredState(settings=settings, plan=plan, log_dir=log_dir, timeout_s=timeout_s)
        return record.complete(_follow(create_controller(desired), timeout_s + _LAUNCH_MARGIN_S, on_change))


def status_of(record: Record) -> DeploymentStatus:
    """What the controller says, or FAILED where there is none."""
    with connected(record.ray_address, token=record.token):
        controller = find_controller(record.name)
        if controller is None:
            return record.lost(f"its controller is gone; clean up with: echelon down {record.name}")
        try:
            _, now = _ask(controller, newer_than=-1)
        except StartError as err:
            return record.lost(f"{err}; clean up with: echelon down {record.name}")
        return record.complete(now)


def end(record: Record, grace_s: float) -> None:
    """Stop the processes, kill the controller, and wait until Ray has nothing of ours left."""
    with connected(record.ray_address, token=record.token):
        controller = find_controller(record.name)
        if controller is not None:
            _stop(controller, grace_s)
        remove_groups(record.name)
        deadline = time.monotonic() + _GONE_TIMEOUT_S
        while left := remnants(record.name):
            if time.monotonic() > deadline:
                raise StartError(f"Ray still has, after {_GONE_TIMEOUT_S:.0f} s: {', '.join(left)}; try again")
            time.sleep(_POLL_S)


def _follow(controller: Any, timeout_s: float, on_change: Callable[[ProcessStatus], None]) -> DeploymentStatus:
    """Report what changes until the deployment serves; raise its failure."""
    deadline = time.monotonic() + timeout_s
    seen: dict[str, ProcessStatus] = {}
    version = -1
    while time.monotonic() < deadline:
        version, now = _ask(controller, newer_than=version)
        for process in now.processes:
            if seen.get(process.name) != process:
                seen[process.name] = process
                on_change(process)
        if now.state is State.READY:
            return now
        lost = now.state is State.DEGRADED and any(process.state is State.FAILED for process in now.processes)
        if now.state is State.FAILED or lost:
            raise StartError(now.reason, now.detail)
    raise StartError(f"the controller did not finish within {timeout_s:.0f} s")


def _ask(controller: Any, *, newer_than: int) -> tuple[int, DeploymentStatus]:
    try:
        answer: tuple[int, DeploymentStatus] = ray.get(
            controller.status.remote(newer_than, _LONG_POLL_S), timeout=_ANSWER_TIMEOUT_S
        )
    except RayError as err:
        raise StartError(f"the controller does not answer: {err}") from err
    return answer


def _stop(controller: Any, grace_s: float) -> None:
    try:
        ray.get(controller.stop.remote(grace_s), timeout=_NUM_GRACES * grace_s + _ANSWER_TIMEOUT_S)
    except RayError as err:
        # It hangs or is dead: its end takes its hosts along, and theirs their children.
        logger.warning("the controller did not answer stop: %s", err)
    ray.kill(controller)
