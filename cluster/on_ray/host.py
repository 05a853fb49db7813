"""A process on a node of the Ray cluster: an actor in its bundle runs it as a child and relays what it says."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.on_ray.cluster import NAMESPACE
from cluster.planning.plan import Bundle, describe_devices
from cluster.processes.child import ChildProcess
from cluster.processes.spares import SpareKeeper
from cluster.processes.startup import Launch, recipe_of
from echelon.pb.process_pb2 import ProcessEvent, ProcessUpdate, WorkerSpec

logger = logging.getLogger(__name__)

_LOST_HOST_STATUS = 255  # exit status of a process whose host died, as ssh reports a lost connection
_CALL_TIMEOUT_S = 30.0
_LOST_POLL_S = 0.5  # how often a call that a host does not answer looks whether the host is lost
_NUM_THREADS = 4  # a call that waits for events, one that stops, one that reads the log, and one to spare


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedProcess:
    """What a host says of the process that it has started last."""

    pid: int
    gpu_ids: tuple[str, ...]  # Ray's choice
    node_id: str
    host_name: str  # of the actor
    launch_number: int  # how often such a process was started, with this time
    incarnation: int  # of a worker's group; 0: it is a control process
    events: tuple[ProcessEvent, ...] = ()  # that it has said, for a controller that has not heard them


class InOrder:
    """Passes the updates of one teller on by their numbers, whatever order they come in. Thread-safe.

    Ray may run calls in another order than they were made. So an update may come before the call that starts its
    process: it waits for that.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._teller = ""
        self._tell: Callable[[ProcessUpdate], None] = lambda _: None
        self._former: set[str] = set()  # what comes late from these is dropped
        self._waiting: dict[str, dict[int, ProcessUpdate]] = {}  # by teller and number
        self._next = 0

    def begin(self, teller: str, tell: Callable[[ProcessUpdate], None]) -> None:
        """From now on pass on what `teller` says, and drop what any before it still says."""
        with self._lock:
            self._former.add(self._teller)
            self._waiting.pop(self._teller, None)
            self._teller, self._tell, self._next = teller, tell, 0
            self._pass_on()

    def take(self, teller: str, number: int, update: ProcessUpdate) -> None:
        """`number`: of the update, counted by its teller from 0."""
        with self._lock:
            if teller not in self._former:
                self._waiting.setdefault(teller, {})[number] = update
                self._pass_on()

    def _pass_on(self) -> None:
        waiting = self._waiting.get(self._teller, {})
        while self._next in waiting:
            self._tell(waiting.pop(self._next))
            self._next += 1


class ProcessHost:
    """The actor. It holds the devices of its bundle; its child runs on them and dies with it.

    Once the child has ended, `start` may start another. It outlives the controller that made it.
    """

    def __init__(self) -> None:
        self._keeper = SpareKeeper()
        self._child: ChildProcess | None = None
        self._hosted: HostedProcess | None = None
        self._updates = InOrder()
        self._starting = threading.Lock()
        self._hearing = threading.Lock()  # who hears what: a call of a controller that was lost may still wait here
        self._teller = ""
        self._events: list[ProcessEvent] = []
        self._unheard: list[ProcessEvent] = []  # that such a call has taken

    def prepare(self, launch: Launch, log_dir: Path) -> None:
        """`start` follows, or has come before: Ray may run calls in another order than they were made."""
        with self._starting:
            if self._hosted is None or launch.number > self._hosted.launch_number:
                self._keeper.prepare(recipe_of(launch, log_dir, _gpu_ids()))

    def keep_spare(self, is_wanted: bool) -> None:
        self._keeper.keep(is_wanted)

    def start(self, launch: Launch, log_dir: Path, teller: str) -> HostedProcess:
        """`teller`: who will tell the process of updates."""
        with self._starting:
            return self._start(launch, log_dir, teller)

    def _start(self, launch: Launch, log_dir: Path, teller: str) -> HostedProcess:
        context, gpu_ids = ray.get_runtime_context(), _gpu_ids()
        child = self._keeper.start(recipe_of(launch, log_dir, gpu_ids), launch.spec, log_name=launch.log_name)
        with self._hearing:
            self._child, self._teller, self._events, self._unheard = child, teller, [], []
        self._updates.begin(teller, child.tell)
        assert child.pid is not None, "a child process has a pid"
        self._hosted = HostedProcess(
            pid=child.pid,
            gpu_ids=gpu_ids,
            node_id=context.get_node_id(),
            host_name=context.get_actor_name() or "",
            launch_number=launch.number,
            incarnation=launch.spec.incarnation if isinstance(launch.spec, WorkerSpec) else 0,
        )
        return self._hosted

    def take_over(self, teller: str) -> HostedProcess | None:
        """The process, which has another teller from now on, with what it has said so far; None: none was started."""
        if self._hosted is None:
            return None
        self._updates.begin(teller, self._started().tell)
        with self._hearing:
            self._teller, self._unheard = teller, []
            return replace(self._hosted, events=tuple(self._events))

    def watch(self, teller: str, timeout_s: float) -> tuple[int | None, ProcessEvent | None]:
        """The exit status, asked before the next event is awaited, and that event; nothing for a former teller."""
        with self._hearing:
            child = self._started()
            exit_status = child.poll()
            if teller != self._teller:
                return None, None
            if self._unheard:
                return exit_status, self._unheard.pop(0)
        event = child.next_event(timeout_s)
        return exit_status, None if event is None else self._heard(child, teller, event)

    def _heard(self, child: ChildProcess, teller: str, event: ProcessEvent) -> ProcessEvent | None:
        """The event, if it is the teller's to hear."""
        with self._hearing:
            if child is not self._child:
                return None
            if event.WhichOneof("event") not in ("progress", "spare"):
                self._events.append(event)
            if teller == self._teller:
                return event
            self._unheard.append(event)
            return None

    def stderr_tail(self) -> str:
        return self._started().stderr_tail()

    def tell(self, teller: str, number: int, update: ProcessUpdate) -> None:
        self._updates.take(teller, number, update)

    def stop(self, grace_s: float) -> None:
        if self._child is not None:
            self._child.stop(grace_s)

    def _started(self) -> ChildProcess:
        assert self._child is not None, "start comes first"
        return self._child


class RayChild:
    """A process behind a host, with the methods of `cluster.processes.child.Child`."""

    def __init__(self, launch: Launch, host: Any, starting: Any, teller: str) -> None:
        """`starting`: its HostedProcess, or Ray's reference of one; `teller`: as the host knows this object.

        Does not block: the host may still be coming up.
        """
        self.name = launch.name
        self.pid: int | None = None
        self.devices = ""
        self.node_id = ""
        self._bundle = launch.bundle
        self._host = host
        self._exit_status: int | None = None
        self._lost = ""  # why the host cannot be asked any more
        self._teller = teller
        self._telling = threading.Lock()
        self._num_told = 0
        self._starting = starting
        if isinstance(starting, HostedProcess):
            self._on_started(starting)

    def abandon(self, reason: str) -> None:
        """Its host is lost. Ray may take long to notice, and nobody is to wait for that."""
        self._lost, self._exit_status = reason, _LOST_HOST_STATUS

    def next_event(self, timeout_s: float) -> ProcessEvent | None:
        if self._lost:
            return None
        try:
            if self.pid is None and not self._has_started(timeout_s):
                return None
            self._exit_status, event = self._watch(timeout_s)
        except RayError as err:
            self._lost = f"its host is lost: {_first_line(err)}"
            self._exit_status = _LOST_HOST_STATUS
            return None
        assert event is None or isinstance(event, ProcessEvent), "a host relays events"
        return event

    def _watch(self, timeout_s: float) -> Any:
        return ray.get(self._host.watch.remote(self._teller, timeout_s), timeout=timeout_s + _CALL_TIMEOUT_S)

    def poll(self) -> int | None:
        return self._exit_status

    @property
    def has_host(self) -> bool:
        """Whether its host has answered so far, and could start another process."""
        return not self._lost

    def tell(self, update: ProcessUpdate) -> None:
        with self._telling:
            self._host.tell.remote(self._teller, self._num_told, update)  # if its host is gone, so is the process
            self._num_told += 1

    def stop(self, grace_s: float) -> None:
        """The host stays."""
        deadline = time.monotonic() + grace_s + _CALL_TIMEOUT_S
        try:
            stopping = [] if self._lost else [self._host.stop.remote(grace_s)]
            while stopping and not self._lost and time.monotonic() < deadline:
                done, stopping = ray.wait(stopping, timeout=_LOST_POLL_S)
                ray.get(done)
        except RayError as err:
            # Where the host is gone its child has seen its standard input end.
            self._lost = f"its host did not answer stop: {_first_line(err)}"
            logger.info("%s: %s", self.name, self._lost)

    def stderr_tail(self) -> str:
        if self._lost:
            return self._lost
        try:
            return str(ray.get(self._host.stderr_tail.remote(), timeout=_CALL_TIMEOUT_S))
        except RayError as err:
            return f"its host is lost: {_first_line(err)}"

    def _has_started(self, timeout_s: float) -> bool:
        try:
            hosted: HostedProcess = ray.get(self._starting, timeout=timeout_s)
        except GetTimeoutError:
            return False
        self._on_started(hosted)
        return True

    def _on_started(self, hosted: HostedProcess) -> None:
        self.pid, self.node_id = hosted.pid, hosted.node_id
        self.devices = describe_devices(self._bundle, hosted.gpu_ids)


def start_child(launch: Launch, host: Any, log_dir: Path) -> RayChild:
    teller = new_teller()
    starting = host.start.remote(launch, log_dir, teller)
    return RayChild(launch, host, starting, teller)


def _gpu_ids() -> tuple[str, ...]:
    """Of this actor: Ray's choice."""
    return tuple(str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))


def new_teller() -> str:
    return uuid4().hex


def find_host(name: str) -> Any:
    """Raises ValueError if there is none."""
    return ray.get_actor(name, namespace=NAMESPACE)


def host_in_bundle(name: str, bundle: Bundle, group: PlacementGroup) -> Any:
    """A host that takes the whole of a worker's bundle."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle.rank)
    return _host(name, scheduling_strategy=strategy, num_cpus=bundle.num_cpus, num_gpus=bundle.num_gpus)


def host_on_node(name: str, node_id: str) -> Any:
    """A host for a control process: on this node and no other, without a share of its CPUs."""
    return _host(name, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False), num_cpus=0)


def _host(name: str, **options: Any) -> Any:
    options |= {"name": name, "namespace": NAMESPACE, "max_concurrency": _NUM_THREADS, "lifetime": "detached"}
    return ray.remote(ProcessHost).options(**options).remote()


def _first_line(err: Exception) -> str:
    return str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
