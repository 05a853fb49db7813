"""A deployment that lives as long as the process that started it: what containers and service managers run."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster import lifecycle, state_dir
from cluster.deployment.deployment_file import load_deployment
from cluster.errors import DeploymentNotFoundError, StartError
from cluster.lifecycle import OnEvent, PlanMade, UpEvent
from cluster.processes.status import DeploymentStatus, State

logger = logging.getLogger(__name__)

RETRY_S = 5.0
_LOOK_S = 15.0  # each look connects to Ray, which takes a second of a core
_MOST_FAILED_LOOKS = 3  # in a row: a controller may be too busy to answer, or Ray may be starting it again


class Stopped(BaseException):
    """Raised in the main thread by whoever asks the deployment to end."""


def serve(
    path: Path,
    *,
    ray_address: str | None = None,
    patience_s: float = 0.0,
    on_event: OnEvent = lambda _: None,
    on_ready: Callable[[DeploymentStatus], None] = lambda _: None,
    look_s: float = _LOOK_S,
) -> None:
    """Start the deployment, return once it was taken down: by `Stopped`, or elsewhere.

    What an earlier process has left of it is taken down first. A cluster that has no place yet, or that does not answer
    yet, is asked again for `patience_s`. Raises what `lifecycle.up` raises, and StartError once the deployment fails.
    """
    name = load_deployment(path).name
    _take_down_what_was_left(name)
    try:
        on_ready(_up(path, ray_address, patience_s, on_event))
        _follow(name, look_s)
    except Stopped:
        logger.info("asked to stop")
    finally:
        _take_down(name)


def _up(path: Path, ray_address: str | None, patience_s: float, on_event: OnEvent) -> DeploymentStatus:
    """Try again while nothing has been started: the cluster does not answer, or has no place."""
    planned = threading.Event()

    def noted(event: UpEvent) -> None:
        if isinstance(event, PlanMade):
            planned.set()
        on_event(event)

    deadline, told = time.monotonic() + patience_s, ""
    while True:
        try:
            return lifecycle.up(path, ray_address=ray_address, on_event=noted)
        except StartError as err:
            if planned.is_set() or time.monotonic() >= deadline:
                raise
            if told != (told := str(err)):
                logger.warning("waiting for the cluster: %s", told)
        time.sleep(RETRY_S)


def _follow(name: str, look_s: float) -> None:
    """Return when the deployment is gone; raise StartError when it has failed."""
    num_failed = 0
    while True:
        try:
            status = lifecycle.status(name)
        except DeploymentNotFoundError:
            return
        num_failed = num_failed + 1 if status.state is State.FAILED else 0
        if num_failed == _MOST_FAILED_LOOKS:
            raise StartError(f"{name} is FAILED: {status.reason}", status.detail)
        time.sleep(look_s)


def _take_down_what_was_left(name: str) -> None:
    """Its Ray may be gone, or be out of reach: if it still runs the deployment, `up` finds that out and refuses."""
    try:
        _take_down(name)
    except StartError as err:
        logger.warning("forgetting the earlier %s: %s", name, err)
        state_dir.forget(name)


def _take_down(name: str) -> None:
    with contextlib.suppress(DeploymentNotFoundError):
        lifecycle.down(name)
