"""What the command line does with deployments: plan, up, status, down, list."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.deployment_file import load_deployment
from cluster.inventory import local_inventory
from cluster.plan import Plan, make_plan
from cluster.status import DeploymentStatus, ProcessStatus


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


def plan(path: Path, *, ray_address: str | None = None) -> Plan:
    """Where everything would run, on the cluster at `ray_address`, or on this machine alone when it is None.

    Raises ConfigError, PlanError. Starts nothing.
    """
    settings = load_deployment(path)
    if ray_address is not None:
        raise NotImplementedError
    return make_plan(settings, local_inventory())


def up(
    path: Path,
    *,
    ray_address: str | None = None,
    on_event: Callable[[UpEvent], None] = lambda _: None,
    timeout_s: float | None = None,
) -> DeploymentStatus:
    """Deploy and return when it serves; on any failure everything is taken down again.

    `ray_address` (or RAY_ADDRESS) names a cluster; without, a private Ray is started. `timeout_s` overrides the
    file's startup_timeout_s. Raises ConfigError, PlanError, StartError.
    """
    raise NotImplementedError


def status(name: str) -> DeploymentStatus:
    """Raises DeploymentNotFoundError."""
    raise NotImplementedError


def down(name: str, *, grace_s: float = 10.0) -> None:
    """End every process, actor and placement group of the deployment. Raises DeploymentNotFoundError."""
    raise NotImplementedError


def list_deployments() -> list[str]:
    """Names of the deployments that were started from this machine and not taken down."""
    raise NotImplementedError
