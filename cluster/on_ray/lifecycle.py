"""The half of `cluster.lifecycle` that talks to Ray."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.deployment.changes import Change, Effect, changes
from cluster.deployment.settings import Settings
from cluster.errors import PlanError, StartError
from cluster.on_ray.cluster import (
    NAMESPACE,
    controller_name,
    end_actors,
    find_controller,
    plan_now,
    remnants,
    remove_groups,
)
from cluster.on_ray.controller import Controller
from cluster.on_ray.desired import DesiredState
from cluster.on_ray.joining import connected
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
_NUM_THREADS = 8  # of the controller: each call of `status` that waits for news takes one


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
        return record.complete(_follow(_create_controller(desired), timeout_s + _LAUNCH_MARGIN_S, on_change))


def apply(
    record: Record,
    settings: Settings,
    *,
    on_changes: Callable[[Sequence[Change]], None],
    on_change: Callable[[ProcessStatus], None],
    dry_run: bool,
) -> DeploymentStatus:
    """Make what runs what `settings` say, and block until it is so."""
    with _controlling(record) as controller:
        before: DesiredState = _answer(controller.desired.remote)
        found = changes(before.settings, settings)
        on_changes(found)
        _check_possible(record, before, settings, found)
        if (found or before.unfinished) and not dry_run:
            _follow_change(controller, controller.apply.remote(settings), on_change)
        return record.complete(_ask(controller, newer_than=-1)[1])


def _check_possible(record: Record, before: DesiredState, settings: Settings, found: Sequence[Change]) -> None:
    """Raises PlanError."""
    if later := [change.key for change in found if change.effect is Effect.DOWN]:
        raise PlanError(
            f"{', '.join(later)} cannot change while {record.name} runs; change it back, or run echelon down and up"
        )
    is_rolled = before.others or any(change.effect is Effect.ROLLED for change in found)
    is_alone = settings.num_replicas_from(len(before.plan.replicas)) == 1
    if is_rolled and is_alone and settings.rollout == "in_place":
        raise PlanError(
            "replicas.rollout: in_place: with one replica nothing would serve meanwhile; use surge, or add a replica"
        )


def scale(
    record: Record,
    num_replicas: int,
    *,
    on_changes: Callable[[Sequence[Change]], None],
    on_change: Callable[[ProcessStatus], None],
) -> DeploymentStatus:
    """Change the number of replicas, and nothing else."""
    with _controlling(record) as controller:
        desired: DesiredState = _answer(controller.desired.remote)
    settings = desired.settings
    if desired.others:
        raise PlanError(desired.unfinished)
    if settings.scaling is not None:
        raise PlanError(
            "replicas follow the load (replicas.target_ongoing_requests); edit replicas.min and replicas.max, and run "
            "echelon apply"
        )
    most = max(settings.max_replicas, num_replicas)
    wanted = replace(settings, num_replicas=num_replicas, max_replicas=most)
    return apply(record, wanted, on_changes=on_changes, on_change=on_change, dry_run=False)


def drain(record: Record, timeout_s: float | None) -> int:
    """The number of requests that are left after this time."""
    with _controlling(record) as controller:
        if timeout_s is None:
            timeout_s = _answer(controller.desired.remote).settings.drain_timeout_s
        num_left: int = _follow_change(controller, controller.drain.remote(timeout_s), lambda _: None)
        return num_left


def resume(record: Record) -> None:
    with _controlling(record) as controller:
        _follow_change(controller, controller.resume.remote(), lambda _: None)


def restart(record: Record, parts: Sequence[str], *, on_change: Callable[[ProcessStatus], None]) -> DeploymentStatus:
    with _controlling(record) as controller:
        _follow_change(controller, controller.restart.remote(list(parts)), on_change)
        return record.complete(_ask(controller, newer_than=-1)[1])


@contextmanager
def _controlling(record: Record) -> Iterator[Any]:
    """The controller of a deployment that runs."""
    with connected(record.ray_address, token=record.token):
        controller = find_controller(record.name)
        if controller is None:
            raise StartError(f"its controller is gone; clean up with: echelon down {record.name}")
        yield controller


def _follow_change(controller: Any, change: Any, on_change: Callable[[ProcessStatus], None]) -> Any:
    """Report what happens until the change has been made; its result. Raises its failure."""
    seen: dict[str, ProcessStatus] = {process.name: process for process in _ask(controller, newer_than=-1)[1].processes}
    version, is_over = -1, False
    while not is_over:
        is_over = bool(ray.wait([change], timeout=0)[0])
        version, now = _ask(controller, newer_than=version)
        for process in now.processes:
            if seen.get(process.name) != process:
                seen[process.name] = process
                on_change(process)
    try:
        return ray.get(change)
    except RayTaskError as err:
        raise err.cause if isinstance(err.cause, StartError) else StartError(str(err)) from err
    except RayError as err:
        raise StartError(f"the controller does not answer: {err}") from err


def status_of(record: Record) -> DeploymentStatus:
    """What the controller says, or FAILED where it cannot be asked."""
    clean_up = f"clean up with: echelon down {record.name}"
    try:
        with connected(record.ray_address, token=record.token):
            controller = find_controller(record.name)
            if controller is None:
                return record.lost(f"its controller is gone; {clean_up}")
            _, now = _ask(controller, newer_than=-1)
            return record.complete(now)
    except StartError as err:
        return record.lost(f"{err}; {clean_up}")


def end(record: Record, grace_s: float) -> None:
    """Stop the processes, kill the controller, and wait until Ray has nothing of ours left."""
    with connected(record.ray_address, token=record.token):
        controller = find_controller(record.name)
        if controller is not None:
            _stop(controller, grace_s)
        deadline = time.monotonic() + _GONE_TIMEOUT_S
        while left := remnants(record.name):
            if time.monotonic() > deadline:
                raise StartError(f"Ray still has, after {_GONE_TIMEOUT_S:.0f} s: {', '.join(left)}; try again")
            end_actors(record.name)  # again and again: a controller that is killed may have asked for some just before
            remove_groups(record.name)
            time.sleep(_POLL_S)


def _create_controller(desired: DesiredState) -> Any:
    """Start the actor, on the node where the gateway will run. It outlives this process."""
    return (
        ray.remote(Controller)
        .options(
            name=controller_name(desired.settings.name),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,  # hosts outlive it, and the next one takes them over
            max_concurrency=_NUM_THREADS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(desired.plan.gateways[0].process.node_id, soft=False),
        )
        .remote(desired)
    )


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
    answer: tuple[int, DeploymentStatus] = _answer(lambda: controller.status.remote(newer_than, _LONG_POLL_S))
    return answer


def _answer(ask: Callable[[], Any]) -> Any:
    """Ray starts a controller again that was lost: then the question is asked again."""
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            return ray.get(ask(), timeout=_ANSWER_TIMEOUT_S)
        except ActorUnavailableError as err:
            if time.monotonic() > deadline:
                raise StartError(f"the controller does not answer: {err}") from err
        except RayError as err:
            raise StartError(f"the controller does not answer: {err}") from err
        time.sleep(_POLL_S)


def _stop(controller: Any, grace_s: float) -> None:
    try:
        ray.get(controller.stop.remote(grace_s), timeout=_NUM_GRACES * grace_s + _ANSWER_TIMEOUT_S)
    except RayError as err:
        # It hangs or is dead. Its hosts are ended next, and their end takes their children along.
        logger.warning("the controller did not answer stop: %s", err)
    ray.kill(controller)
