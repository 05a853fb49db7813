"""Start processes, watch them, stop them: the same wherever they run."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from cluster.errors import StartError
from cluster.planning.plan import Bundle
from cluster.process_id import ProcessId
from cluster.processes.child import Child
from cluster.processes.status import ProcessStatus
from cluster.processes.supervision import Board

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 1.0
_WATCHER_GRACE_S = 10.0  # a watcher ends within an interval; not measured
_LATE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A process to be started."""

    id: ProcessId
    module: str
    spec: Message
    node: str = ""  # address
    bundle: Bundle | None = None  # of a worker; None for a control process
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.id.name


T = TypeVar("T")
Spawn = Callable[[Launch], Child]


class ProcessSet:
    """The processes of a deployment: launched by `spawn`, each watched by a thread that keeps the board.

    Thread-safe. `on_change` is called, from any thread and one call at a time, with a process that has changed.
    """

    def __init__(self, spawn: Spawn, *, on_change: Callable[[ProcessStatus], None] = lambda _: None) -> None:
        self._spawn = spawn
        self._on_change = on_change
        self._board = Board()
        self._changed = threading.Condition()
        self._children: dict[str, Child] = {}
        self._watchers: list[threading.Thread] = []
        self._stopped = False

    def expect(self, processes: Iterable[ProcessId]) -> None:
        """Show these processes as pending until they are launched."""
        with self._changed:
            self._board = Board(processes)

    def launch(self, launch: Launch) -> None:
        with self._changed:
            if self._stopped:
                raise StartError(f"{launch.name}: not started, the deployment is being taken down")
            self._board.on_launch(launch.id, launch.node)
        child = self._spawn(launch)
        if not self._take(child):
            child.stop(_LATE_GRACE_S)
            raise StartError(f"{launch.name}: ended again, the deployment is being taken down")

    def wait_ready(self, names: Iterable[str], deadline: float) -> None:
        """Block until all of these are ready. Raises StartError as soon as any process has failed, or at the deadline.

        `deadline` is on the clock of time.monotonic().
        """
        names = list(names)
        self._wait(lambda board: board.is_ready(names), deadline)

    def wait_store(self, leader: str, deadline: float) -> str:
        """Block until the leader has opened its store; its address. Raises as wait_ready does."""
        self._wait(lambda board: board.store_address(leader) is not None, deadline)
        with self._changed:
            address = self._board.store_address(leader)
        assert address is not None, "the board forgets no store"
        return address

    def all_ready(self) -> None:
        """The start is over: from now on the end of a process changes the deployment's state."""
        with self._changed:
            self._board.on_all_ready()
            self._changed.notify_all()

    def read(self, look: Callable[[Board], T]) -> T:
        """What `look` returns for the board; it must not keep the board."""
        with self._changed:
            return look(self._board)

    def wait_change(self, version: int, timeout_s: float) -> None:
        """Block until the board is newer than `version`, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self._board.version > version, timeout_s)

    def stop(self, grace_s: float, *, order: Iterable[str] = ()) -> None:
        """End every process: those in `order` one after the other, then all others at once. Idempotent."""
        with self._changed:
            self._stopped = True
            self._board.on_stopping()
            self._changed.notify_all()
            children = dict(self._children)
        for name in order:
            if name in children:
                children.pop(name).stop(grace_s)
        if children:
            with ThreadPoolExecutor(max_workers=len(children)) as pool:
                list(pool.map(lambda child: child.stop(grace_s), children.values()))
        for watcher in self._watchers:
            watcher.join(timeout=_WATCHER_GRACE_S)

    def _take(self, child: Child) -> bool:
        """Watch a child. False if stop() came while the child was being spawned and so does not know it."""
        watcher = threading.Thread(target=self._watch, args=(child,), name=f"watch {child.name}", daemon=True)
        with self._changed:
            if self._stopped:
                return False
            self._children[child.name] = child
            self._watchers.append(watcher)
            self._board.on_place(child.name, pid=child.pid, devices=child.devices)
            self._announce(child.name)
            watcher.start()
        return True

    def _wait(self, done: Callable[[Board], bool], deadline: float) -> None:
        with self._changed:
            while not done(self._board):
                failed = self._board.first_failure()
                if failed is not None:
                    raise StartError(f"{failed.name}: {failed.error}", self._board.detail(failed.name))
                if self._stopped:
                    raise StartError("the deployment is being taken down")
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise StartError(
                        f"not ready in time: {self._board.laggards()}; raise startup_timeout_s if it is slow"
                    )
                self._changed.wait(remaining_s)

    def _announce(self, name: str) -> None:
        self._changed.notify_all()
        self._on_change(self._board.process(name))

    def _watch(self, child: Child) -> None:
        while True:
            # Asked before the events: what a process said before its end is in the queue by then.
            exit_status = child.poll()
            event = child.next_event(_WATCH_INTERVAL_S)
            has_ended = event is None and exit_status is not None
            stderr_tail = child.stderr_tail() if has_ended else ""
            with self._changed:
                version = self._board.version
                self._board.on_place(child.name, pid=child.pid, devices=child.devices)
                if event is not None:
                    self._board.on_event(child.name, event)
                elif exit_status is not None:
                    self._board.on_exit(child.name, exit_status, stderr_tail)
                if self._board.version != version:
                    self._announce(child.name)
            if has_ended:
                return
