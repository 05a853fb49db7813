"""Start processes, watch them, stop them: the same wherever they run."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from cluster.errors import StartError
from cluster.planning.plan import Bundle
from cluster.process_id import ProcessId
from cluster.processes.child import Child
from cluster.processes.spares import Recipe
from cluster.processes.status import ProcessStatus
from cluster.processes.supervision import Board
from echelon.pb.process_pb2 import ProcessEvent, ProcessUpdate

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 1.0
_WATCHER_GRACE_S = 10.0  # a watcher ends within an interval; not measured
_LATE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A process to be started."""

    id: ProcessId
    module: str
    spare_module: str = ""  # what is started ahead of need; empty: nothing is
    spec: Message
    node: str = ""  # address
    bundle: Bundle | None = None  # of a worker; None for a control process
    env: Mapping[str, str] = field(default_factory=dict)
    number: int = 1  # how often such a process was started, with this time

    @property
    def name(self) -> str:
        return self.id.name

    @property
    def log_name(self) -> str:
        """Of the file that takes its log: the log of a lost process says why it was lost."""
        return f"{self.name}.log" if self.number == 1 else f"{self.name}.{self.number}.log"


def recipe_of(launch: Launch, log_dir: Path, gpu_ids: Sequence[str]) -> Recipe:
    """How its process is started, on these GPUs."""
    env = {**launch.env, "CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)}
    return Recipe(module=launch.module, spare_module=launch.spare_module, name=launch.name, log_dir=log_dir, env=env)


T = TypeVar("T")
Spawn = Callable[[Launch], Child]


class Spares(Protocol):
    """Processes that are started before they are needed."""

    def prepare(self, launch: Launch) -> None:
        """It is about to be spawned, as soon as all of its spec is known."""
        ...

    def keep_spare(self, name: str, is_wanted: bool) -> None:
        """Whether a process is to be kept ready that could take the place of this one."""
        ...


class ProcessSet:
    """The processes of a deployment: launched by `spawn`, each watched by a thread that keeps the board.

    Thread-safe. `on_change` is called, from any thread and one call at a time, with a process that has changed.
    """

    def __init__(
        self,
        spawn: Spawn,
        *,
        spares: Spares | None = None,
        on_change: Callable[[ProcessStatus], None] = lambda _: None,
    ) -> None:
        """`spares`: None: no process is started before it is needed."""
        self._spawn, self._spares = spawn, spares
        self._on_change = on_change
        self._board = Board()
        self._changed = threading.Condition()
        self._children: dict[str, Child] = {}
        self._num_launches: Counter[str] = Counter()
        self._watchers: list[threading.Thread] = []
        self._stopped = False

    def expect(self, processes: Iterable[ProcessId]) -> None:
        """Show these processes as pending until they are launched."""
        with self._changed:
            self._board = Board(processes)

    def prepare(self, launch: Launch) -> None:
        """It will be launched: what it does before it has its spec can begin now. Raises StartError."""
        with self._changed:
            if self._spares is None or self._stopped:
                return
            launch = replace(launch, number=self._num_launches[launch.name] + 1)
        self._spares.prepare(launch)
        if self.read(lambda _: self._stopped):  # meanwhile
            self._spares.keep_spare(launch.name, False)

    def keep_spare(self, name: str, is_wanted: bool) -> None:
        """Whether a process is to be kept ready that could take the place of this one."""
        if self._spares is not None:
            self._spares.keep_spare(name, is_wanted)

    def launch(self, launch: Launch) -> None:
        with self._changed:
            if self._stopped:
                raise StartError(f"{launch.name}: not started, the deployment is being taken down")
            self._board.on_launch(launch.id, launch.node)
            self._num_launches[launch.name] += 1
            launch = replace(launch, number=self._num_launches[launch.name])
        child = self._spawn(launch)
        if not self._take(child):
            child.stop(_LATE_GRACE_S)
            raise StartError(f"{launch.name}: ended again, the deployment is being taken down")

    def adopt(self, launch: Launch, child: Child, events: Iterable[ProcessEvent]) -> None:
        """Watch a process that somebody else has started, and that has said `events`."""
        with self._changed:
            self._board.on_launch(launch.id, launch.node)
            self._num_launches[launch.name] = launch.number
            for event in events:
                self._board.on_event(launch.name, event)
        self._take(child)

    def miss(self, name: str, reason: str) -> None:
        """A process of which nothing is left: the next one of its name may not be taken for it."""
        with self._changed:
            self._num_launches[name] += 1
        self.fail([name], reason)

    def wait_ready(self, names: Iterable[str], deadline: float, *, within: Sequence[str] | None = None) -> None:
        """Block until all of these are ready. Raises StartError as soon as any process has failed, or at the deadline.

        `deadline` is on the clock of time.monotonic(). `within`: only failures of these processes count.
        """
        names = list(names)
        self._wait(lambda board: board.is_ready(names), deadline, within)

    def wait_store(self, leader: str, deadline: float, *, within: Sequence[str] | None = None) -> str:
        """Block until the leader has opened its store; its address. Raises as wait_ready does."""
        self._wait(lambda board: board.store_address(leader) is not None, deadline, within)
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

    def devices_of(self, name: str) -> str:
        """What a process was given, for people; empty before it runs, and once it was removed."""
        return self.read(lambda board: board.process(name).devices if board.knows(name) else "")

    def wait_change(self, version: int, timeout_s: float) -> None:
        """Block until the board is newer than `version`, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self._board.version > version, timeout_s)

    def tell(self, name: str, update: ProcessUpdate) -> None:
        """Write an update to a process that is ready; does nothing if it has ended."""
        with self._changed:
            child = self._children.get(name)
        if child is not None:
            child.tell(update)

    def fail(self, names: Iterable[str], reason: str) -> None:
        """Processes that live but are of no use any more count as failed; those that were removed do not count."""
        with self._changed:
            for name in filter(self._board.knows, names):
                self._board.on_useless(name, reason)
                self._announce(name)

    def give_up(self, names: Iterable[str]) -> None:
        """These will not be started again."""
        with self._changed:
            self._board.on_given_up(names)
            self._changed.notify_all()

    def join(self, processes: Iterable[ProcessId]) -> None:
        """Show more processes as pending; the deployment's state does not depend on them until they have `joined`."""
        with self._changed:
            self._board.on_joining(processes)
            self._changed.notify_all()

    def joined(self, names: Iterable[str]) -> None:
        with self._changed:
            self._board.on_joined(names)
            self._changed.notify_all()

    def remove(self, names: Sequence[str], grace_s: float, *, order: Iterable[str] = ()) -> None:
        """End these processes, in the order of `stop`, and forget them."""
        with self._changed:
            children = {name: self._children.pop(name) for name in names if name in self._children}
        self._end_spares(children)
        for name in order:
            if name in children:
                children.pop(name).stop(grace_s)
        _stop_all(list(children.values()), grace_s)
        with self._changed:
            self._board.on_removed(names)
            self._changed.notify_all()

    def clear(self, names: Sequence[str]) -> None:
        """Kill what is left of these processes and return when it is gone, so that they can be launched again."""
        with self._changed:
            children = [self._children.pop(name) for name in names if name in self._children]
        _stop_all(children, grace_s=0.0)
        with self._changed:
            for name in names:
                self._board.on_cleared(name)
                self._announce(name)

    def stop(self, grace_s: float, *, order: Iterable[str] = ()) -> None:
        """End every process: those in `order` one after the other, then all others at once. Idempotent."""
        with self._changed:
            self._stopped = True
            self._board.on_stopping()
            self._changed.notify_all()
            children = dict(self._children)
        self._end_spares(children)
        for name in order:
            if name in children:
                children.pop(name).stop(grace_s)
        _stop_all(list(children.values()), grace_s)
        for watcher in self._watchers:
            watcher.join(timeout=_WATCHER_GRACE_S)

    def _end_spares(self, names: Iterable[str]) -> None:
        for name in names:
            self.keep_spare(name, False)

    def _take(self, child: Child) -> bool:
        """Watch a child. False if stop() came while the child was being spawned and so does not know it."""
        watcher = threading.Thread(target=self._watch, args=(child,), name=f"watch {child.name}", daemon=True)
        with self._changed:
            if self._stopped:
                return False
            self._children[child.name] = child
            self._watchers = [known for known in self._watchers if known.is_alive()] + [watcher]
            self._board.on_place(child.name, pid=child.pid, devices=child.devices)
            self._announce(child.name)
            watcher.start()
        return True

    def _wait(self, done: Callable[[Board], bool], deadline: float, within: Sequence[str] | None) -> None:
        with self._changed:
            while not done(self._board):
                failed = self._board.first_failure(within)
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
        try:
            while self._follow(child):
                pass
        except Exception as err:  # the edge of the thread: a process that nobody watches would never be missed
            logger.exception("cannot watch %s any more", child.name)
            with self._changed:
                if self._children.get(child.name) is child:
                    self.fail([child.name], f"cannot be watched any more: {err!r}")

    def _follow(self, child: Child) -> bool:
        """Note what it says next; False: nothing more will come of it."""
        # Asked before the events: what a process said before its end is in the queue by then.
        exit_status = child.poll()
        event = child.next_event(_WATCH_INTERVAL_S)
        has_ended = event is None and exit_status is not None
        stderr_tail = child.stderr_tail() if has_ended else ""
        with self._changed:
            if self._children.get(child.name) is not child:
                return False  # `clear` or `remove` has ended it, and another may have its name by now
            version = self._board.version
            self._board.on_place(child.name, pid=child.pid, devices=child.devices)
            if event is not None:
                self._board.on_event(child.name, event)
            elif exit_status is not None:
                self._board.on_exit(child.name, exit_status, stderr_tail)
            if self._board.version != version:
                self._announce(child.name)
        return not has_ended


def _stop_all(children: Sequence[Child], grace_s: float) -> None:
    if children:
        with ThreadPoolExecutor(max_workers=len(children)) as pool:
            list(pool.map(lambda child: child.stop(grace_s), children))
