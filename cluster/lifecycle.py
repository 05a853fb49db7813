"""What the command line does with deployments: plan, up, status, down, list.

Ray is imported only by what needs it (`cluster.on_ray.lifecycle`): it takes a second.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import state_dir
from cluster.deployment.deployment_file import load_deployment
from cluster.errors import DeploymentNotFoundError, StartError
from cluster.on_ray.runtime import is_listening, start_private_ray, stop_private_ray
from cluster.planning.inventory import local_inventory
from cluster.planning.plan import Plan
from cluster.planning.planner import make_plan
from cluster.processes.status import DeploymentStatus, ProcessStatus, State
from cluster.state_dir import Record

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 10.0  # for each process to finish what it does; not measured
_FAILED_GRACE_S = 1.0  # a start that failed has nothing to finish


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConnected:
    address: str
    private: bool  # started for this deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMade:
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessChanged:
    process: ProcessStatus


UpEvent = RayConnected | PlanMade | ProcessChanged
OnEvent = Callable[[UpEvent], None]


def plan(path: Path, *, ray_address: str | None = None) -> Plan:
    """Where everything would run, on the cluster at `ray_address`, or on this machine alone when it is None.

    Raises ConfigError, PlanError, StartError (no Ray at that address). Starts nothing.
    """
    settings = load_deployment(path)
    if ray_address is None:
        return make_plan(settings, local_inventory())
    from cluster.on_ray import lifecycle as ray_lifecycle

    return ray_lifecycle.plan_on(settings, _checked(ray_address))


def up(
    path: Path,
    *,
    ray_address: str | None = None,
    on_event: OnEvent = lambda _: None,
    timeout_s: float | None = None,
) -> DeploymentStatus:
    """Deploy and return when it serves; on any failure, Ctrl-C included, everything is taken down again.

    `ray_address` (or RAY_ADDRESS) names a cluster; without one, a private Ray is started. `timeout_s` overrides the
    file's startup_timeout_s. Raises ConfigError, PlanError, StartError.
    """
    settings = load_deployment(path)
    if timeout_s is not None:
        settings = replace(settings, startup_timeout_s=timeout_s)
    record = state_dir.claim(settings.name, path)
    try:
        record = _with_ray(record, ray_address or os.environ.get("RAY_ADDRESS"))
        on_event(RayConnected(address=record.ray_address, private=record.private_ray is not None))
        from cluster.on_ray import lifecycle as ray_lifecycle

        return ray_lifecycle.deploy(
            record,
            settings,
            on_plan=lambda made: on_event(PlanMade(plan=made)),
            on_change=lambda process: on_event(ProcessChanged(process=process)),
        )
    except BaseException:
        _clean_up(settings.name)
        raise


def status(name: str) -> DeploymentStatus:
    """How a deployment fares; FAILED with a reason where its Ray or its controller is gone.

    Raises DeploymentNotFoundError.
    """
    record = state_dir.load(name)
    if not record.ray_address:
        return DeploymentStatus(name=name, state=State.PENDING, reason="its Ray is starting")
    if not is_listening(record.ray_address):
        return record.lost(f"its Ray at {record.ray_address} does not answer; clean up with: echelon down {name}")
    from cluster.on_ray import lifecycle as ray_lifecycle

    return ray_lifecycle.status_of(record)


def down(name: str, *, grace_s: float = _STOP_GRACE_S) -> None:
    """End every process, actor and placement group of the deployment, and its Ray if it is a private one.

    Raises DeploymentNotFoundError, or StartError naming what could not be ended.
    """
    _take_down(state_dir.load(name), grace_s=grace_s)


def list_deployments() -> list[str]:
    """Names of the deployments that were started from this machine and not taken down."""
    return state_dir.names()


def _with_ray(record: Record, ray_address: str | None) -> Record:
    if ray_address:
        record = replace(record, ray_address=_checked(ray_address))
    else:
        private = start_private_ray(state_dir.folder_of(record.name) / "logs" / "ray.log")
        record = replace(record, ray_address=private.address, private_ray=private)
    state_dir.save(record)
    return record


def _checked(ray_address: str) -> str:
    """The address, if something listens there: asked first, since Ray takes a minute to give up."""
    if "://" in ray_address:
        remedy = "run echelon on a node of the cluster and give host:port of its GCS"
        raise StartError(f"{ray_address} is no address of a GCS; {remedy}")
    if not is_listening(ray_address):
        remedy = "start it, or leave --ray-address and RAY_ADDRESS out to use a private Ray"
        raise StartError(f"no Ray cluster answers at {ray_address}; {remedy}")
    return ray_address


def _clean_up(name: str) -> None:
    """Take down what a failed start has left. What goes wrong here must not hide why the start failed."""
    try:
        _take_down(state_dir.load(name), grace_s=_FAILED_GRACE_S)
    except DeploymentNotFoundError:
        logger.info("%s has been taken down by somebody else", name)
    except StartError as err:
        logger.warning("%s is not entirely gone: %s; run: echelon down %s", name, err, name)


def _take_down(record: Record, *, grace_s: float) -> None:
    # A Ray that does not answer has taken our actors with it.
    if record.ray_address and is_listening(record.ray_address):
        from cluster.on_ray import lifecycle as ray_lifecycle

        try:
            ray_lifecycle.end(record, grace_s)
        except StartError as err:
            if record.private_ray is None:
                raise
            logger.warning("%s; its private Ray is ended with all that runs in it", err)
    if record.private_ray is not None:
        stop_private_ray(record.private_ray, grace_s=grace_s)
    state_dir.forget(record.name)
