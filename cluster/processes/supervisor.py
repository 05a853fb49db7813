"""Keeps a deployment running: what is lost is started again beside what runs, wherever the processes are."""

import logging
import math
import sys
import threading
import time

from cluster.deployment.settings import Settings
from cluster.errors import PlanError, StartError
from cluster.planning.plan import Plan, ReplicaPlan
from cluster.process_id import PartId
from cluster.processes.handover import Handover
from cluster.processes.recovery import Recovery
from cluster.processes.restarts import Replan, Restarts, stay
from cluster.processes.rollout import RunningDeployment, RunningReplica
from cluster.processes.spares import with_spares
from cluster.processes.specs import ENGINE_ROLES, gateway_model, names_by_part, placed_processes
from cluster.processes.startup import ProcessSet
from cluster.processes.status import DeploymentEvent, ProcessStatus, State, TierUse
from cluster.processes.supervision import Board
from cluster.processes.telling import ToldGateways, tell_scheduler
from cluster.processes.vitals import VitalsWatch, wait_until_used
from cluster.processes.whereabouts import Whereabouts
from echelon.pb import process_pb2

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0  # how often silence is looked for; a death is noticed at once
_DRAIN_POLL_S = 0.1
_HEARD_S = 5.0  # what was heard before is no measure of the load
_NEVER = sys.maxsize  # a version that the board does not reach
_GIVEN_UP = "it was lost and is not started again"


class Supervisor:
    """Watches the parts of a deployment that serves, from a thread, until `stop`. Each part is started again in a
    thread of its own, since that takes as long as the start did."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        processes: ProcessSet,
        running: RunningDeployment,
        identity: process_pb2.ProcessIdentity | None = None,
        *,
        replan: Replan = stay,
    ) -> None:
        """`identity`: with which it asks schedulers how they fare; None: wires are plain."""
        self._settings, self._processes = settings, processes
        self._whereabouts = Whereabouts(plan, processes, running)
        gateways = [gateway.process for gateway in self._whereabouts.gateways.values()]
        self._names = names_by_part([*(each for replica in plan.replicas for each in replica.processes), *gateways])
        self._starts: dict[PartId, threading.Thread] = {}  # the latest of each part
        now = time.monotonic()
        self._lock = threading.Lock()
        can_start = self._names if settings.rebuild else ()
        needs = {part: parts for replica in plan.replicas for part, parts in replica.needs.items()}
        self._recovery = Recovery(self._names, now, can_start=can_start, needs=needs)
        asked = [replica.scheduler.id for replica in plan.replicas]
        asked += [gateway.id for gateway in gateways]
        self._vitals = VitalsWatch(asked, self._address_of, identity)
        numbers = [replica.number for replica in plan.replicas]
        self._told = ToldGateways(processes, [gateway.name for gateway in gateways], numbers)
        self._restarts = Restarts(
            plan=plan,
            processes=processes,
            whereabouts=self._whereabouts,
            told=self._told,
            on_start=self._vitals.on_start,
            replan=replan,
        )
        self._has_spare: set[str] = set()  # of which one is kept, as far as this object has asked for it
        self._handover = Handover(self._processes, self._whereabouts, self._told, self._is_up)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    @property
    def running(self) -> RunningDeployment:
        """Where everything is now."""
        return self._whereabouts.running

    @property
    def endpoint(self) -> str:
        """Addresses of the gateways, as clients take them."""
        return ",".join(self._whereabouts.gateway_addresses.values())

    def use(self, settings: Settings) -> None:
        """For the deployment as a whole from now on; a replica keeps those with which it was started."""
        self._settings = settings

    def add(self, replica: ReplicaPlan, running: RunningReplica) -> None:
        """One more replica, which serves; gateways may send requests to it from now on, all new ones if it is the first
        of its model. Raises StartError if a gateway cannot read requests for that."""
        names = names_by_part(replica.processes)
        self._whereabouts.add(replica, running)
        with self._lock:
            for part in names:
                needs = replica.needs.get(part, ())
                self._recovery.add(part, time.monotonic(), can_start=self._settings.rebuild, needs=needs)
            self._names = {**self._names, **names}
        self._vitals.add(replica.scheduler.id)
        placed = placed_processes(replica.processes, self._processes.devices_of)
        news, address = gateway_model(running.settings), running.scheduler_address
        self._told.add(replica.number, process_pb2.SchedulerUpdate(address=address, processes=placed, model=news))
        if self._told.is_drained:
            return
        unused = wait_until_used(address, self._told.gateways, self._address_of, self._stopped)
        if unused and self._whereabouts.is_last_of_its_model(replica.number):
            raise StartError(f"{unused} does not read requests for {running.settings.model_name}; its log says why")

    def restart(self, name: str) -> None:
        """Start a part again, by its or a process's name, and block until it is up. Raises StartError."""
        part = next((part for part, names in self._names.items() if name in (part.name, *names)), None)
        if part is None:
            known = ", ".join(name for names in self._names.values() for name in names)
            raise StartError(f"there is no process {name!r}; there are {known}")
        if not self._settings.rebuild:
            raise StartError("with rebuild: false nothing is started again; run echelon down and up")
        with self._lock:
            if not self._recovery.is_up(part):
                raise StartError(f"{part.name} is not up; it is started again anyway, or was given up")
        self._processes.fail(self._names.get(part, [])[:1], "a restart was asked for")
        self._on_lost(part, "a restart was asked for")
        self._wait_up(part)

    def _wait_up(self, part: PartId) -> None:
        while not self._stopped.wait(_DRAIN_POLL_S):
            with self._lock:
                if self._recovery.is_up(part):
                    return
                if self._recovery.is_given_up(part):
                    raise StartError(f"{part.name} did not come up again: {self._recovery.events[-1].text}")
                if not self._recovery.knows(part):
                    raise StartError(f"{part.name} was removed before it was up again")
        raise StartError(f"{part.name} is not started again: the deployment is being taken down")

    def drain(self, timeout_s: float) -> int:
        """No replica gets new requests until `resume`. Blocks until none has any, at most this long; returns how many
        are left. Raises StartError if a replica does not say how many it has."""
        self._told.drain(True)
        deadline = time.monotonic() + timeout_s
        for replica in self._whereabouts.plans:
            self._wait_idle(replica, deadline)
        heard = self._heard_requests()
        if silent := [name for name, number in heard.items() if number is None]:
            raise StartError(f"it takes no new requests, but {', '.join(silent)} cannot be asked whether any still run")
        return sum(number or 0 for number in heard.values())

    def resume(self) -> None:
        """Replicas get requests again, but for those that are about to be removed."""
        self._told.drain(False)

    def retire(self, replica: ReplicaPlan, timeout_s: float) -> None:
        """The replica gets no new requests. Blocks until it has none, at most this long: after that, what it still runs
        goes on at others. If no other serves its model, it takes as long as it takes."""
        self._told.retire(replica.number)
        if self._whereabouts.is_last_of_its_model(replica.number):
            timeout_s = math.inf
        self._wait_idle(replica, time.monotonic() + timeout_s)

    def _wait_idle(self, replica: ReplicaPlan, deadline: float) -> None:
        settled_s = time.monotonic() + _INTERVAL_S  # for the gateway to hear of it
        while time.monotonic() < deadline and not self._stopped.is_set():
            if self._vitals.num_requests(replica.scheduler.name, since_s=settled_s) == 0:
                return
            with self._lock:
                if any(self._recovery.is_given_up(part) for part in names_by_part(replica.processes)):
                    return
            self._stopped.wait(_DRAIN_POLL_S)

    def remove(self, replica: ReplicaPlan) -> None:
        """The replica is about to be ended; what it still runs goes on at others."""
        names = names_by_part(replica.processes)
        with self._lock:
            for part in names:
                self._recovery.remove(part)
            self._names = {part: known for part, known in self._names.items() if part not in names}
            starts = [start for part in names if (start := self._starts.get(part)) is not None]
        self._vitals.remove(replica.scheduler.name)
        self._told.remove(replica.number)
        for start in starts:
            while start.is_alive():
                self._processes.fail([name for known in names.values() for name in known], "its replica is removed")
                start.join(_DRAIN_POLL_S)
        self._whereabouts.remove(replica.number)

    def stop(self) -> None:
        """Start nothing any more; whoever stops the processes afterwards ends the starts under way."""
        self._stopped.set()
        self._vitals.stop()

    def judge(self, board: Board) -> tuple[State, str, tuple[ProcessStatus, ...]]:
        """The deployment's state, the reason, and the processes as they are to be shown."""
        state, reason = board.deployment()
        processes = board.processes
        if self._told.is_drained and state in (State.READY, State.DEGRADED):
            return State.DRAINED, "it takes no new requests; echelon drain --undo ends that", processes
        if state in (State.READY, State.DEGRADED):
            now_state, now_reason, processes = self._vitals.judge(processes)
            if state is State.READY or now_state is State.NOT_RESPONDING:
                state, reason = now_state, now_reason
        return state, reason, processes

    def num_requests(self) -> int | None:
        """That wait or run on all replicas, as heard within the last seconds; None: nothing was heard."""
        known = [number for number in self._heard_requests().values() if number is not None]
        return sum(known) if known else None

    def _heard_requests(self) -> dict[str, int | None]:
        """The same of each scheduler."""
        since_s = time.monotonic() - _HEARD_S
        schedulers = [replica.scheduler.name for replica in self._whereabouts.plans]
        return {name: self._vitals.num_requests(name, since_s=since_s) for name in schedulers}

    def note(self, part: str, text: str) -> None:
        """Show this as an event."""
        with self._lock:
            self._recovery.note(part, text, time.monotonic())

    def tell_all(self, *, is_drained: bool) -> None:
        """Where everything is, of which processes that somebody else has watched so far may know only a part."""
        self._told.is_drained = is_drained
        for replica in self._whereabouts.plans:
            self._whereabouts.tell_of_groups(replica.number)
        self._told.repeat(self._whereabouts.news_of)

    def tiers(self) -> tuple[TierUse, ...]:
        return self._vitals.tiers()

    def events(self) -> tuple[DeploymentEvent, ...]:
        with self._lock:
            events = self._recovery.events
        began = time.time() - time.monotonic()
        return tuple(DeploymentEvent(at=began + event.at_s, part=event.part, text=event.text) for event in events)

    def _address_of(self, name: str) -> str:
        process = self._processes.read(lambda board: board.ready_process(name))
        return "" if process is None else process.asked_at

    def _watch(self) -> None:
        while not self._stopped.is_set():
            version = self._processes.read(lambda board: board.version)
            try:
                self._notice_losses()
                wait_s = self._start_due(time.monotonic())
                self._keep_spares()
            except Exception:  # the edge of the thread: without it, nothing would ever be started again
                logger.exception("what was lost could not be noticed; it is looked for again")
                wait_s, version = _INTERVAL_S, _NEVER
            self._processes.wait_change(version, wait_s)

    def _start_due(self, now: float) -> float:
        """For how many seconds there is nothing more to do."""
        with self._lock:  # until the thread is known, so that `remove` can wait for it
            for part in self._recovery.take_due(now):
                start = threading.Thread(target=self._restart, args=(part,), name=f"start {part.name}", daemon=True)
                self._starts[part] = start
                start.start()
            return max(0.0, min(_INTERVAL_S, self._recovery.next_due() - now))

    def _keep_spares(self) -> None:
        """A spare takes the place of what is lost, so that another one is asked for when the part is up again."""
        bundles = [bundle for replica in self._whereabouts.plans for bundle in replica.bundles]
        chosen = set(with_spares(bundles, self._settings.spares) if self._settings.rebuild else ())
        with self._lock:
            up = {name for part, names in self._names.items() if self._recovery.is_up(part) for name in names}
        for name in sorted(self._has_spare & up - chosen):
            self._processes.keep_spare(name, False)
        for name in sorted(chosen & up - self._has_spare):
            self._processes.keep_spare(name, True)
        self._has_spare = chosen & up
        num_ready = sum(process.spare == "ready" for process in self._processes.read(lambda board: board.processes))
        self._told.tell_of_spares(process_pb2.SparesUpdate(num_ready=num_ready, num_wanted=len(chosen)))

    def _notice_losses(self) -> None:
        for part, names in self._names.items():
            failed = self._processes.read(lambda board, names=names: board.first_failure(names))  # type: ignore[misc]
            if failed is not None:
                self._on_lost(part, f"{failed.name}: {failed.error}")
        for part, reason in self._vitals.lost().items():
            with self._lock:
                is_settled = self._recovery.is_settled(part, time.monotonic())
            if is_settled and self._settings.rebuild:  # otherwise it may answer again
                self._processes.fail(self._names.get(part, [])[:1], reason)

    def _on_lost(self, part: PartId, reason: str) -> None:
        with self._lock:
            if not self._recovery.is_up(part):
                return
            self._recovery.on_lost(part, reason, time.monotonic())
        self._give_up_hopeless(part)

    def _give_up_hopeless(self, part: PartId) -> None:
        with self._lock:
            is_hopeless = self._recovery.is_given_up(part)
        if not is_hopeless:
            return
        self._processes.give_up(self._names[part])
        if part.role == "target":
            news = process_pb2.GroupUpdate(role=ENGINE_ROLES["target"], given_up=_GIVEN_UP)
            tell_scheduler(self._processes, self._whereabouts.replica(part.replica)[0], news)
        elif part.role == "scheduler":
            self._told.tell(part.replica, process_pb2.SchedulerUpdate(given_up=_GIVEN_UP))

    def _restart(self, part: PartId) -> None:
        try:
            with self._lock:
                has_no_place = self._recovery.has_no_place(part)
            if not has_no_place:  # otherwise it says why until there is one
                self._processes.clear(self._names[part])
            self._restarts.start(part, self._names[part], time.monotonic() + self._settings.startup_timeout_s)
        except PlanError as err:
            self._on_no_place(part, str(err))
        except StartError as err:
            self._on_failed_start(part, str(err))
        except Exception as err:  # the edge of the thread: nobody else would try again
            logger.exception("the start of %s broke", part.name)
            self._on_failed_start(part, repr(err))
        else:
            if part.role == "target":
                self._handover.end(part.replica)
            board = self._processes.read(lambda board: board.processes)
            num_spares = sum(each.was_spare for each in board if each.id.part == part)
            with self._lock:
                self._recovery.on_up(part, time.monotonic(), num_spares=num_spares)

    def _on_no_place(self, part: PartId, reason: str) -> None:
        with self._lock:
            if not self._recovery.knows(part):
                return  # its replica was removed meanwhile
            self._recovery.on_no_place(part, reason, time.monotonic())
        self._processes.fail(self._names.get(part, [])[:1], reason)
        if part.role == "target":
            self._handover.begin(part.replica, reason)

    def _is_up(self, part: PartId) -> bool:
        with self._lock:
            return self._recovery.is_up(part)

    def _on_failed_start(self, part: PartId, error: str) -> None:
        if self._stopped.is_set():
            return
        with self._lock:
            self._recovery.on_failed_start(part, error, time.monotonic())
        self._give_up_hopeless(part)
