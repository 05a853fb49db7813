"""What the command line does with deployments: plan, up, status, down, list.

Ray is imported only by what needs it (`cluster.on_ray.lifecycle`): it takes a second.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import state_dir
from cluster.deployment.changes import Change
from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.settings import Settings
from cluster.errors import DeploymentNotFoundError, StartError
from cluster.planning.drafters import ASSUMED, estimate_drafters
from cluster.planning.inventory import local_inventory
from cluster.planning.inventory_file import read_inventory
from cluster.planning.plan import Plan
from cluster.planning.planner import make_plan
from cluster.private_ray import is_listening, start_private_ray, stop_private_ray
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesFound:
    changes: Sequence[Change]


UpEvent = RayConnected | PlanMade | ProcessChanged | ChangesFound
OnEvent = Callable[[UpEvent], None]


def plan(
    path: Path,
    *,
    ray_address: str | None = None,
    inventory: Path | None = None,
    acceptances: Sequence[float] = (),
    bandwidth: float | None = None,
) -> Plan:
    """Where everything would run: on the machines that the file `inventory` lists, else on the cluster at
    `ray_address`, else on this machine alone.

    `acceptances`: probabilities that a draft is accepted, at which to estimate what drafters gain; `bandwidth`: bytes a
    second that a device reads, else what is common. Raises ConfigError, PlanError, StartError (no Ray at that address).
    Starts nothing.
    """
    settings = load_deployment(path)
    made = _place(settings, ray_address=ray_address, inventory=inventory)
    speed = ASSUMED[settings.device]
    if bandwidth is not None:
        speed = replace(speed, bandwidth=bandwidth)
    estimates = (each for rate in acceptances for each in estimate_drafters(settings, rate, speed))
    return replace(made, drafters=tuple(estimates))


def _place(settings: Settings, *, ray_address: str | None, inventory: Path | None) -> Plan:
    if inventory is not None:
        return make_plan(settings, read_inventory(inventory))
    if ray_address is None:
        return make_plan(settings, local_inventory(settings.kv_cache.disk, settings.server))
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
    settings = load_deployment(path, startup_timeout_s=timeout_s)
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


def apply(path: Path, *, on_event: OnEvent = lambda _: None, dry_run: bool = False) -> DeploymentStatus:
    """Change a running deployment to what its edited file says, and return when it is so.

    Replicas come and go while the others serve. Raises ConfigError; PlanError, naming the keys that cannot change while
    it runs, or where there is no place; StartError, and then it runs as before; DeploymentNotFoundError.
    """
    settings = load_deployment(path)
    record = state_dir.load(settings.name)
    from cluster.on_ray import lifecycle as ray_lifecycle

    status = ray_lifecycle.apply(
        record,
        settings,
        on_changes=lambda found: on_event(ChangesFound(changes=found)),
        on_change=lambda process: on_event(ProcessChanged(process=process)),
        dry_run=dry_run,
    )
    if not dry_run:
        state_dir.note_file(settings.name, path)
    return status


def scale(name: str, num_replicas: int, *, on_event: OnEvent = lambda _: None) -> DeploymentStatus:
    """Change the number of replicas and return when it is so. Raises as `apply`."""
    record = state_dir.load(name)
    from cluster.on_ray import lifecycle as ray_lifecycle

    return ray_lifecycle.scale(
        record,
        num_replicas,
        on_changes=lambda found: on_event(ChangesFound(changes=found)),
        on_change=lambda process: on_event(ProcessChanged(process=process)),
    )


def drain(name: str, *, timeout_s: float | None = None) -> int:
    """Take no new requests, until `resume`. Blocks until none runs, at most this long (default: the deployment's
    drain_timeout_s); the number of those that are left. Raises DeploymentNotFoundError, StartError."""
    record = state_dir.load(name)
    from cluster.on_ray import lifecycle as ray_lifecycle

    return ray_lifecycle.drain(record, timeout_s)


def resume(name: str) -> None:
    """Take requests again. Raises DeploymentNotFoundError, StartError."""
    record = state_dir.load(name)
    from cluster.on_ray import lifecycle as ray_lifecycle

    ray_lifecycle.resume(record)


def restart(name: str, parts: Sequence[str] = (), *, on_event: OnEvent = lambda _: None) -> DeploymentStatus:
    """Start these parts or processes again, one after the other, and return when they are up; none: all but the
    gateway. Raises DeploymentNotFoundError, StartError."""
    record = state_dir.load(name)
    from cluster.on_ray import lifecycle as ray_lifecycle

    return ray_lifecycle.restart(record, parts, on_change=lambda process: on_event(ProcessChanged(process=process)))


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
        raise StartError(f"{ray_address} is not the address of a GCS; {remedy}")
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
