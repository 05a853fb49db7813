"""The controller: a detached, named Ray actor that places, starts and watches the processes of one deployment.

It owns their hosts and placement groups, so that its own end frees everything.
"""

import logging
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.deployment.settings import Role, Settings
from cluster.errors import StartError
from cluster.on_ray.cluster import NAMESPACE, actor_name, group_name, reserve
from cluster.on_ray.host import RayChild, host_in_bundle, host_on_node
from cluster.planning.plan import Plan
from cluster.processes.child import Child
from cluster.processes.rollout import check_port, process_ids, roll_out, stop_order
from cluster.processes.startup import Launch, ProcessSet
from cluster.processes.status import DeploymentStatus, State
from cluster.processes.supervision import Board
from cluster.processes.vitals import VitalsWatch
from echelon import __version__

logger = logging.getLogger(__name__)

_RESERVE_TIMEOUT_S = 15.0  # the plan counts on free devices only, so this is Ray's own delay
_FAILED_GRACE_S = 2.0
_NUM_THREADS = 8  # each call of `status` that waits for news takes one


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """What a controller has to bring up."""

    settings: Settings
    plan: Plan
    log_dir: Path  # on each node
    timeout_s: float  # for the start
    version: str = __version__


def controller_name(deployment: str) -> str:
    return actor_name(deployment, "controller")


class Controller:
    """The actor. The start runs in a thread of its own, so that status and stop are always answered."""

    def __init__(self, desired: DesiredState) -> None:
        if desired.version != __version__:
            raise StartError(
                f"this node runs Echelon {__version__}, the command line {desired.version}; make them equal"
            )
        self._desired = desired
        self._groups: dict[Role, PlacementGroup] = {}
        self._hosts: dict[str, Any] = {}
        self._failure: StartError | None = None
        self._endpoint = ""
        self._vitals: VitalsWatch | None = None  # once it serves
        self._processes = ProcessSet(self._spawn)
        self._processes.expect(process_ids(desired.plan))
        self._starter = threading.Thread(target=self._start, name="start", daemon=True)
        self._starter.start()

    def status(self, newer_than: int = -1, timeout_s: float = 0.0) -> tuple[int, DeploymentStatus]:
        """The version of the state and the state, after waiting at most so long for one newer than `newer_than`."""
        self._processes.wait_change(newer_than, timeout_s)
        return self._processes.read(self._status_of)

    def stop(self, grace_s: float) -> None:
        """End every process and give every placement group back. Idempotent."""
        if self._vitals is not None:
            self._vitals.stop()
        self._processes.stop(grace_s, order=stop_order(self._desired.plan))
        self._starter.join()
        self._end_hosts()
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()

    def _start(self) -> None:
        settings, plan = self._desired.settings, self._desired.plan
        deadline = time.monotonic() + self._desired.timeout_s
        try:
            check_port(settings.server.host, settings.server.grpc_port, "server.grpc_port")
            if settings.server.http_port:
                check_port(settings.server.host, settings.server.http_port, "server.http_port")
            for role in ("target", "draft"):
                bundles = plan.group(role)
                if bundles:
                    self._groups[role] = reserve(group_name(settings.name, role), bundles, _RESERVE_TIMEOUT_S)
            self._create_hosts()
            running = roll_out(settings, plan, self._processes, timeout_s=deadline - time.monotonic())
            self._endpoint = running.gateway_address
            self._vitals = self._processes.read(
                lambda board: VitalsWatch(board.process(plan.scheduler.name), board.process(plan.gateway.name))
            )
        except StartError as err:
            self._give_up(err)
        except Exception as err:  # the edge of the thread: whoever waits for the start must hear of every error
            logger.exception("the start of %s broke", settings.name)
            self._give_up(StartError(f"{type(err).__name__}: {err}", traceback.format_exc()))

    def _give_up(self, failure: StartError) -> None:
        logger.warning("%s did not start: %s", self._desired.settings.name, failure)
        self._failure = failure
        self._processes.stop(_FAILED_GRACE_S, order=stop_order(self._desired.plan))
        self._end_hosts()

    def _create_hosts(self) -> None:
        """All at once, since each takes a second or two to come up."""
        plan = self._desired.plan
        for bundle in plan.bundles:
            name = actor_name(plan.deployment, bundle.name)
            self._hosts[bundle.name] = host_in_bundle(name, bundle, self._groups[bundle.group])
        for process in (plan.scheduler, plan.gateway):
            self._hosts[process.name] = host_on_node(actor_name(plan.deployment, process.name), process.node_id)

    def _end_hosts(self) -> None:
        for host in self._hosts.values():
            ray.kill(host)
        self._hosts.clear()

    def _spawn(self, launch: Launch) -> Child:
        return RayChild(launch, self._hosts[launch.name], self._desired.log_dir)

    def _status_of(self, board: Board) -> tuple[int, DeploymentStatus]:
        settings = self._desired.settings
        state, reason, detail = self._verdict(board)
        processes = board.processes
        if self._vitals is not None and state in (State.READY, State.DEGRADED):
            now_state, now_reason, processes = self._vitals.judge(processes)
            if state is State.READY or now_state is State.NOT_RESPONDING:
                state, reason = now_state, now_reason
        return board.version, DeploymentStatus(
            name=settings.name,
            state=state,
            reason=reason,
            detail=detail,
            endpoint=self._endpoint,
            metrics_url=settings.metrics_url if self._endpoint else "",
            model=settings.model_name,
            processes=processes,
            tiers=self._vitals.tiers() if self._vitals is not None else (),
            plan=self._desired.plan,
            settings=shown_settings(settings),
        )

    def _verdict(self, board: Board) -> tuple[State, str, str]:
        """State, reason, and the traceback or log tail that explains it."""
        if self._failure is not None:
            return State.FAILED, str(self._failure), self._failure.detail
        state, reason = board.deployment()
        if state is State.FAILED and self._starter.is_alive():
            return State.STARTING, reason, ""  # the starter is about to say which failure was the cause
        failed = board.first_failure()
        return state, reason, "" if failed is None else board.detail(failed.name)


def shown_settings(settings: Settings) -> dict[str, str | int | float | bool]:
    """What defaults and "auto" have become."""
    return {
        "method": settings.method,
        "pipeline": settings.pipeline,
        "num_speculative_tokens": settings.num_speculative_tokens,
        "placement": "colocated" if settings.colocated else "separate",
        "device": settings.device,
        "dtype": settings.target.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.scheduler.max_num_seqs,
        "max_num_batched_tokens": settings.scheduler.max_num_batched_tokens,
        "block_size": settings.kv_cache.block_size,
        "batch_invariant": settings.batch_invariant,
    }


def create_controller(desired: DesiredState) -> Any:
    """Start the actor, on the node where the gateway will run. It outlives this process."""
    return (
        ray.remote(Controller)
        .options(
            name=controller_name(desired.settings.name),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,  # a restarted one would have lost its hosts: they belong to the one that made them
            max_concurrency=_NUM_THREADS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(desired.plan.gateway.node_id, soft=False),
        )
        .remote(desired)
    )


def find_controller(deployment: str) -> Any | None:
    try:
        return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)
    except ValueError:  # Ray's way to say that there is none
        return None
