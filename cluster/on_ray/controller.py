"""The controller: a detached, named Ray actor that places, starts and watches the processes of one deployment.

Their hosts and placement groups outlive it. If it is lost, Ray starts it again, and it takes over what runs.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import ray

from cluster.authority import Authority
from cluster.deployment.settings import Settings
from cluster.errors import StartError
from cluster.on_ray.adoption import adopt, end_others, find_groups, find_processes, where_all_is
from cluster.on_ray.changing import Changer
from cluster.on_ray.cluster import plan_changed_now, plan_for
from cluster.on_ray.desired import DesiredState, load, save
from cluster.on_ray.nodes import NodeWatch
from cluster.on_ray.places import Places
from cluster.on_ray.replacing import Replacer
from cluster.on_ray.scaler import Load, Scaler
from cluster.planning.plan import Bundle, ControlProcess, ReplicaPlan
from cluster.processes.rollout import RunningDeployment, check_ports, process_ids, roll_out, start_replicas, stop_order
from cluster.processes.scaling import Scaling
from cluster.processes.shown_settings import shown_settings
from cluster.processes.startup import ProcessSet
from cluster.processes.status import DeploymentStatus, State
from cluster.processes.supervision import Board
from cluster.processes.supervisor import Supervisor
from echelon import __version__
from echelon.pb.worker_pb2 import EngineRole

logger = logging.getLogger(__name__)

_FAILED_GRACE_S = 2.0
_REMOVED_GRACE_S = 5.0


class Controller:
    """The actor. The start runs in a thread of its own, so that status and stop are always answered."""

    def __init__(self, desired: DesiredState) -> None:
        if desired.version != __version__:
            raise StartError(
                f"this node runs Echelon {__version__}, the command line {desired.version}; make them equal"
            )
        self._desired = desired
        self._is_successor = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        self._places = Places(desired.settings.name, desired.log_dir, Authority.create(desired.settings.name))
        self._failure: StartError | None = None
        self._supervisor: Supervisor | None = None  # once it serves
        self._nodes: NodeWatch | None = None  # once it serves
        self._scaler: Scaler | None = None  # once it serves, if replicas come and go with the load
        self._joining: Sequence[str] = ()  # processes of replicas that are being added
        self._changing = threading.Lock()  # held while `apply` runs
        self._keeping = threading.Lock()  # `drain` and `stop` may come while replicas come and go
        self._is_stopped = False
        self._changer = Changer(
            desired=self.desired,
            add=self._add,
            remove=self._remove,
            plan_more=plan_for,
            plan_changed=plan_changed_now,
        )
        self._processes = ProcessSet(self._places.spawn, spares=self._places)
        self._processes.expect(process_ids(desired.plan))
        self._starter = threading.Thread(target=self._start, name="start", daemon=True)
        self._starter.start()

    def status(self, newer_than: int = -1, timeout_s: float = 0.0) -> tuple[int, DeploymentStatus]:
        """The version of the state and the state, after waiting at most so long for one newer than `newer_than`."""
        self._processes.wait_change(newer_than, timeout_s)
        return self._processes.read(self._status_of)

    def desired(self) -> DesiredState:
        """What it keeps up."""
        return self._desired

    def apply(self, settings: Settings) -> None:
        """Make it what these settings say. Raises StartError; it is written down how far it came."""
        supervisor = self._serving()
        if not self._changing.acquire(blocking=False):
            raise StartError("another change of this deployment is under way; wait until it has ended")
        try:
            self._end_scaler()
            number = settings.num_replicas_from(len(self._desired.plan.replicas))
            self._changer.roll(settings, number)
            self._keep(lambda desired: desired.with_settings(settings))
            supervisor.use(settings)
            self._changer.resize(number)
        finally:
            self._start_scaler(supervisor)
            self._changing.release()

    def _keep(self, change: Callable[[DesiredState], DesiredState]) -> None:
        """Also for the next controller, if this one is lost. Raises StartError; nothing has changed then."""
        with self._keeping:
            self._check_not_stopped()
            desired = change(self._desired)
            try:
                save(desired)
            except OSError as err:
                raise StartError(f"{desired.path} cannot be written: {err}; free space, and try again") from err
            self._desired = desired

    def _check_not_stopped(self) -> None:
        if self._is_stopped:
            raise StartError("the deployment is being taken down")

    def restart(self, names: Sequence[str]) -> None:
        """Start these parts or processes again, one after the other; none: all but the gateway. Raises StartError."""
        replicas = self._desired.plan.replicas
        parts = dict.fromkeys(process.id.part.name for replica in replicas for process in replica.processes)
        for name in names or parts:
            self._serving().restart(name)

    def drain(self, timeout_s: float) -> int:
        """Take no new requests until `resume`; the number of those that are left after this time."""
        supervisor = self._serving()
        self._keep(lambda desired: replace(desired, is_drained=True))
        return supervisor.drain(timeout_s)

    def resume(self) -> None:
        self._serving().resume()
        self._keep(lambda desired: replace(desired, is_drained=False))

    def _start_scaler(self, supervisor: Supervisor) -> None:
        settings = self._desired.settings
        if settings.scaling is None or self._desired.others or self._is_stopped:
            return
        self._scaler = Scaler(
            Scaling(settings.scaling, least=settings.num_replicas, most=settings.max_replicas),
            look=lambda: Load(num_replicas=len(supervisor.running.replicas), num_requests=supervisor.num_requests()),
            change=self._changer.resize,
            give_up=lambda: self._processes.fail(self._joining, "the load needs it no more"),
            note=partial(supervisor.note, "replicas"),
        )

    def _end_scaler(self) -> None:
        if self._scaler is not None:
            self._scaler.stop()
            self._scaler = None

    def _add(self, settings: Settings, replicas: Sequence[ReplicaPlan]) -> None:
        """Start more replicas beside what runs."""
        supervisor = self._serving()
        processes = [process for replica in replicas for process in replica.processes]
        names = [process.name for process in processes]
        others = dict.fromkeys((each.number for each in replicas if settings != self._desired.settings), settings)
        try:
            self._processes.join(process.id for process in processes)
            self._joining = names
            self._places.reserve(replicas)
            self._places.create_hosts(processes)
            deadline = time.monotonic() + settings.startup_timeout_s
            running = start_replicas(settings, replicas, self._processes, deadline, within=names)
            # Before gateways hear of them: another controller ends what it does not know.
            self._keep(lambda desired: desired.with_replicas((*desired.plan.replicas, *replicas), others))
        except BaseException:
            self._end(processes, grace_s=_FAILED_GRACE_S)
            raise
        finally:
            self._joining = ()
        self._processes.joined(names)
        for replica, group in zip(replicas, running, strict=True):
            try:
                supervisor.add(replica, group)
            except StartError:
                self._remove(replica, 0.0)
                raise

    def _remove(self, replica: ReplicaPlan, drain_timeout_s: float) -> None:
        """What runs there may finish within the time limit, and goes on elsewhere then."""
        supervisor = self._serving()
        supervisor.retire(replica, drain_timeout_s)
        supervisor.remove(replica)
        others = [other for other in self._desired.plan.replicas if other.number != replica.number]
        try:
            # From now on another controller would end what is left of it.
            self._keep(lambda desired: desired.with_replicas(others))
        finally:
            with self._keeping:  # it is gone, even if that cannot be written down
                self._desired = self._desired.with_replicas(others)
            self._end(replica.processes, grace_s=_REMOVED_GRACE_S, first=[replica.scheduler.name])

    def _end(self, processes: Sequence[Bundle | ControlProcess], *, grace_s: float, first: Sequence[str] = ()) -> None:
        """These processes, their hosts and their placement groups."""
        self._processes.remove([process.name for process in processes], grace_s, order=first)
        self._places.end(processes)

    def _serving(self) -> Supervisor:
        self._check_not_stopped()
        if self._supervisor is None:
            raise StartError("the deployment does not serve yet; wait until `echelon status` says READY")
        return self._supervisor

    def stop(self, grace_s: float) -> None:
        """End every process and give every placement group back. Idempotent."""
        with self._keeping:
            self._is_stopped = True  # what is being changed is not written down any more
        if self._nodes is not None:
            self._nodes.stop()
        if self._supervisor is not None:
            self._supervisor.stop()
        self._processes.stop(grace_s, order=stop_order(self._desired.plan))
        self._starter.join()
        with self._changing:  # a change under way has failed by now, and starts nothing more once it has ended
            self._end_scaler()
        self._places.end_all()
        self._desired.path.unlink(missing_ok=True)
        self._desired.authority_path.unlink(missing_ok=True)

    def _start(self) -> None:
        try:
            supervisor = self._take_over() if self._is_successor else self._bring_up()
            self._supervisor = supervisor  # from now on others may change it
            self._start_scaler(supervisor)
            self._processes.all_ready()
        except StartError as err:
            self._give_up(err)
        except Exception as err:  # the edge of the thread: whoever waits for the start must learn of every error
            logger.exception("the start of %s broke", self._desired.settings.name)
            self._give_up(StartError(f"{type(err).__name__}: {err}", traceback.format_exc()))

    def _bring_up(self) -> Supervisor:
        settings, plan = self._desired.settings, self._desired.plan
        deadline = time.monotonic() + self._desired.timeout_s
        self._desired.path.unlink(missing_ok=True)
        self._places.authority.save(self._desired.authority_path)
        check_ports(plan, settings.server)
        self._places.reserve(plan.replicas)
        self._places.create_hosts(plan.processes)
        running = roll_out(settings, plan, self._processes, timeout_s=deadline - time.monotonic())
        self._keep(lambda desired: desired)
        return self._supervise(running)

    def _take_over(self) -> Supervisor:
        """The controller before this one was lost. What it had started runs on; nothing is started again."""
        desired = load(self._desired.path)
        if desired is None:
            end_others(self._desired.plan, {}, ())
            raise StartError("the controller was lost before the deployment served; run echelon down, then up")
        self._desired, plan = desired, desired.plan
        self._places.authority = Authority.load(desired.authority_path)
        found, groups = find_processes(plan), find_groups(plan)
        end_others(plan, found, groups)
        hosts = {name: each.host for name, each in found.items()}
        self._places.adopt(plan.processes, groups, hosts, adopt(plan, self._processes, found))
        supervisor = self._supervise(where_all_is(desired, self._processes, found))
        supervisor.note("controller", f"was lost; the next one has taken over {len(found)} processes")
        if desired.unfinished:
            supervisor.note("replicas", desired.unfinished)
        supervisor.tell_all(is_drained=desired.is_drained)
        return supervisor

    def _supervise(self, running: RunningDeployment) -> Supervisor:
        identity = self._places.authority.issue("controller")
        nodes = self._nodes = NodeWatch(self._used_nodes, self._on_lost_nodes)
        replacer = Replacer(
            places=self._places,
            processes=self._processes,
            desired=self.desired,
            keep=self._keep,
            lost_nodes=lambda: nodes.lost,
        )
        return Supervisor(
            self._desired.settings,
            self._desired.plan,
            self._processes,
            running,
            identity,
            replan=replacer.replan,
        )

    def _used_nodes(self) -> dict[str, str]:
        """Addresses by id."""
        return {process.node_id: process.address for process in self._desired.plan.processes}

    def _on_lost_nodes(self, reasons: Mapping[str, str]) -> None:
        for node_id, reason in reasons.items():
            names = self._places.on_node(node_id)
            self._processes.fail(names, reason)
            self._places.abandon(names, reason)

    def _give_up(self, failure: StartError) -> None:
        logger.warning("%s did not start: %s", self._desired.settings.name, failure)
        self._failure = failure
        self._processes.stop(_FAILED_GRACE_S, order=stop_order(self._desired.plan))
        self._places.end_hosts()

    def _status_of(self, board: Board) -> tuple[int, DeploymentStatus]:
        settings = self._desired.settings
        state, reason, detail = self._verdict(board)
        processes, supervisor = board.processes, self._supervisor
        endpoint = ""
        if supervisor is not None:
            endpoint = supervisor.endpoint
            state, reason, processes = supervisor.judge(board)
            if state is State.READY and not self._changing.locked():
                reason = reason or self._desired.unfinished
        return board.version, DeploymentStatus(
            name=settings.name,
            state=state,
            reason=reason,
            detail=detail,
            endpoint=endpoint,
            http_url=self._desired.plan.http_url if endpoint else "",
            model=settings.model_name,
            processes=processes,
            tiers=supervisor.tiers() if supervisor is not None else (),
            events=supervisor.events() if supervisor is not None else (),
            plan=self._desired.plan,
            settings=shown_settings(
                settings,
                board.engine_info(EngineRole.ENGINE_ROLE_TARGET),
                board.engine_info(EngineRole.ENGINE_ROLE_DRAFT),
            ),
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
