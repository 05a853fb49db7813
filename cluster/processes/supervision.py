"""What is known of the processes of a deployment, and what follows for the deployment as a whole. Pure."""

import signal
from collections.abc import Container, Iterable
from dataclasses import replace

from cluster.process_id import ProcessId
from cluster.processes.status import ProcessStatus, State
from echelon.pb.process_pb2 import ProcessEvent
from echelon.pb.worker_pb2 import EngineInfo, EngineRole, WorkerInfo


class Board:
    """The state of each process, driven by its events and its end. Not thread-safe."""

    def __init__(self, processes: Iterable[ProcessId] = ()) -> None:
        self._processes = {process.name: ProcessStatus(id=process) for process in processes}
        self._stores: dict[str, str] = {}
        self._workers: dict[str, WorkerInfo] = {}
        self._details: dict[str, str] = {}
        self._failed: list[str] = []  # in the order in which they did: the first is the cause
        self._first_loss: ProcessStatus | None = None  # also if it was started again
        self._given_up: set[str] = set()  # failed processes that will not be started again
        self._was_ready = False  # every process at once
        self._joining: set[str] = set()  # of replicas that are added while the others serve
        self._stopping = False
        self.version = 0  # grows with every change

    @property
    def processes(self) -> tuple[ProcessStatus, ...]:
        return tuple(self._processes.values())

    def process(self, name: str) -> ProcessStatus:
        return self._processes[name]

    def knows(self, name: str) -> bool:
        return name in self._processes

    def ready_process(self, name: str) -> ProcessStatus | None:
        """None: it is not ready, or was removed."""
        process = self._processes.get(name)
        return process if process is not None and process.state is State.READY else None

    def store_address(self, name: str) -> str | None:
        """host:port of the rendezvous that this leader has opened."""
        return self._stores.get(name)

    def worker_info(self, name: str) -> WorkerInfo:
        return self._workers[name]

    def engine_info(self, role: EngineRole.ValueType) -> EngineInfo | None:
        """What the first rank that is ready has reported of the engine."""
        engines = (engine for worker in self._workers.values() for engine in worker.engines)
        return next((engine for engine in engines if engine.role == role), None)

    def detail(self, name: str) -> str:
        """Traceback or log tail that explains the error of a failed process."""
        return self._details.get(name, "")

    def is_ready(self, names: Iterable[str]) -> bool:
        return all(self._processes[name].state is State.READY for name in names)

    def first_failure(self, within: Container[str] | None = None) -> ProcessStatus | None:
        """`within`: names that count; None: all."""
        failed = (name for name in self._failed if within is None or name in within)
        return next((self._processes[name] for name in failed), None)

    def first_loss(self) -> ProcessStatus | None:
        """As it was when it failed, whether or not it was started again."""
        return self._first_loss

    def on_cleared(self, name: str) -> None:
        """The process has ended and is to be started again; nothing that it said counts any longer."""
        for known in (self._stores, self._workers, self._details):
            known.pop(name, None)
        if name in self._failed:
            self._failed.remove(name)
        self._processes[name] = ProcessStatus(id=self._processes[name].id)
        self.version += 1

    def on_launch(self, process: ProcessId, node: str) -> None:
        self._processes.setdefault(process.name, ProcessStatus(id=process))
        self._change(process.name, state=State.STARTING, node=node)

    def on_place(self, name: str, *, pid: int | None, devices: str) -> None:
        """The process is alive on its node; devices are what it was really given."""
        process = self._processes[name]
        if (process.pid, process.devices) != (pid, devices):
            self._change(name, pid=pid, devices=devices)

    def on_event(self, name: str, event: ProcessEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "store_opened":
            self._stores[name] = event.store_opened.address
            self._change(name, stage="waiting for the other ranks")
        elif kind == "progress":
            progress = event.progress
            self._change(name, stage=progress.stage, done=progress.done, total=progress.total)
        elif kind == "ready":
            self._workers[name] = event.ready.worker
            where = {"address": event.ready.address, "inside_address": event.ready.inside_address}
            self._change(name, state=State.READY, stage="", done=0, total=0, **where)
        elif kind == "failed":
            self._fail(name, event.failed.error, event.failed.detail)
        elif kind == "spare":
            if event.spare.used:
                self._change(name, was_spare=True)
            else:
                self._change(name, spare=event.spare.state)

    def on_exit(self, name: str, exit_status: int, stderr_tail: str) -> None:
        """The process has ended. Its own last word counts more than its exit status."""
        if self._stopping:
            self._change(name, state=State.STOPPED, pid=None)
        elif self._processes[name].state is not State.FAILED:
            self._fail(name, _end_of(exit_status, stderr_tail), stderr_tail)

    def on_useless(self, name: str, reason: str) -> None:
        """It lives, but nobody waits for it any longer."""
        if self._processes[name].state is not State.FAILED:
            self._fail(name, reason, "")

    def on_given_up(self, names: Iterable[str]) -> None:
        self._given_up.update(names)
        self.version += 1

    def on_joining(self, processes: Iterable[ProcessId]) -> None:
        """More processes are about to be started; until they have joined, the deployment is what it is without them."""
        for process in processes:
            self._processes[process.name] = ProcessStatus(id=process)
            self._joining.add(process.name)
        self.version += 1

    def on_joined(self, names: Iterable[str]) -> None:
        self._joining.difference_update(names)
        self.version += 1

    def on_removed(self, names: Iterable[str]) -> None:
        """Nothing is known of them any longer."""
        for name in names:
            for known in (self._processes, self._stores, self._workers, self._details):
                known.pop(name, None)
            if name in self._failed:
                self._failed.remove(name)
            self._given_up.discard(name)
            self._joining.discard(name)
        self.version += 1

    def on_all_ready(self) -> None:
        self._was_ready = True
        self.version += 1

    def on_stopping(self) -> None:
        self._stopping = True
        for process in self.processes:
            if process.state not in (State.STOPPED, State.FAILED):
                self._change(process.name, state=State.STOPPING)

    def deployment(self) -> tuple[State, str]:
        """The deployment's state and why it is not READY."""
        if self._stopping:
            return State.STOPPING, "it is being taken down"
        if self._was_ready:
            return self._since_ready()
        failed = [self._processes[name] for name in self._failed]
        if failed:
            return State.FAILED, _reasons(failed)
        waiting = [process.name for process in self.processes if process.state is not State.READY]
        return State.STARTING, f"not ready yet: {', '.join(waiting)}"

    def _since_ready(self) -> tuple[State, str]:
        """A draft is not needed, nor is a replica while there is another. What is lost is started again, unless it was
        given up."""
        failed = [self._processes[name] for name in self._failed if name not in self._joining]
        starting = (State.PENDING, State.STARTING)
        members = [process for process in self.processes if process.name not in self._joining]
        lost = failed + [process for process in members if process.state in starting]
        if not lost:
            return State.READY, ""
        if self._serves_without(lost):
            return State.DEGRADED, _reasons(lost)
        can_return = self._serves_without(process for process in lost if process.name in self._given_up)
        return (State.RECOVERING if can_return else State.FAILED), _reasons(lost)

    def _serves_without(self, lost: Iterable[ProcessStatus]) -> bool:
        """Whether a gateway and at least one replica are complete but for a draft."""
        ids = {process.id for process in lost}
        members = {process.id for process in self.processes if process.name not in self._joining}
        replicas = {process.replica for process in members if process.role == "target"}
        gateways = {process for process in members if process.role == "gateway"}
        broken = {process.replica for process in ids if process.role in ("target", "scheduler")}
        return (not gateways or bool(gateways - ids)) and bool(replicas - broken)

    def laggards(self) -> str:
        """The processes that are not ready, each with what it last reported."""
        return "; ".join(
            f"{process.name}: {_progress_of(process)}"
            for process in self.processes
            if process.state in (State.PENDING, State.STARTING)
        )

    def _fail(self, name: str, error: str, detail: str) -> None:
        self._failed.append(name)
        self._details[name] = detail
        self._change(name, state=State.FAILED, error=error)
        self._first_loss = self._first_loss or self._processes[name]

    def _change(self, name: str, **fields: object) -> None:
        self._processes[name] = replace(self._processes[name], **fields)  # type: ignore[arg-type]  # names are ours
        self.version += 1


def _reasons(processes: Iterable[ProcessStatus]) -> str:
    return "; ".join(f"{process.name}: {process.error or _progress_of(process)}" for process in processes)


def _progress_of(process: ProcessStatus) -> str:
    if process.state is State.PENDING:
        return "not started"
    if not process.stage:
        return "started, has reported nothing"
    return f"{process.stage} {process.done}/{process.total}" if process.total else process.stage


def _end_of(exit_status: int, stderr_tail: str) -> str:
    if exit_status < 0:
        try:
            end = f"was killed by {signal.Signals(-exit_status).name}"
        except ValueError:
            end = f"was killed by signal {-exit_status}"
    else:
        end = f"ended with exit status {exit_status}"
    last_line = next((line.strip() for line in reversed(stderr_tail.splitlines()) if line.strip()), "its log is empty")
    return f"{end}; last words: {last_line}"
