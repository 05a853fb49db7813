"""What is known of the processes of a deployment, and what follows for the deployment as a whole. Pure."""

import signal
from collections.abc import Iterable
from dataclasses import replace

from cluster.process_id import ProcessId
from cluster.processes.status import ProcessStatus, State
from echelon.pb.process_pb2 import ProcessEvent
from echelon.pb.worker_pb2 import WorkerInfo


class Board:
    """The state of each process, driven by its events and its end. Not thread-safe."""

    def __init__(self, processes: Iterable[ProcessId] = ()) -> None:
        self._processes = {process.name: ProcessStatus(id=process) for process in processes}
        self._stores: dict[str, str] = {}
        self._workers: dict[str, WorkerInfo] = {}
        self._details: dict[str, str] = {}
        self._failed: list[str] = []  # in the order in which they did: the first is the cause
        self._was_ready = False  # every process at once
        self._stopping = False
        self.version = 0  # grows with every change

    @property
    def processes(self) -> tuple[ProcessStatus, ...]:
        return tuple(self._processes.values())

    def process(self, name: str) -> ProcessStatus:
        return self._processes[name]

    def store_address(self, name: str) -> str | None:
        """host:port of the rendezvous that this leader has opened."""
        return self._stores.get(name)

    def worker_info(self, name: str) -> WorkerInfo:
        return self._workers[name]

    def detail(self, name: str) -> str:
        """Traceback or log tail that explains the error of a failed process."""
        return self._details.get(name, "")

    def is_ready(self, names: Iterable[str]) -> bool:
        return all(self._processes[name].state is State.READY for name in names)

    def first_failure(self) -> ProcessStatus | None:
        return self._processes[self._failed[0]] if self._failed else None

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
            self._change(name, state=State.READY, stage="", done=0, total=0, address=event.ready.address)
        elif kind == "failed":
            self._fail(name, event.failed.error, event.failed.detail)

    def on_exit(self, name: str, exit_status: int, stderr_tail: str) -> None:
        """The process has ended. Its own last word counts more than its exit status."""
        if self._stopping:
            self._change(name, state=State.STOPPED, pid=None)
        elif self._processes[name].state is not State.FAILED:
            self._fail(name, _end_of(exit_status, stderr_tail), stderr_tail)

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
        failed = [self._processes[name] for name in self._failed]
        if failed:
            reason = "; ".join(f"{process.name}: {process.error}" for process in failed)
            only_drafts = all(process.id.role == "draft" for process in failed)
            return (State.DEGRADED if only_drafts and self._was_ready else State.FAILED), reason
        if self._was_ready:
            return State.READY, ""
        waiting = [process.name for process in self.processes if process.state is not State.READY]
        return State.STARTING, f"not ready yet: {', '.join(waiting)}"

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

    def _change(self, name: str, **fields: object) -> None:
        self._processes[name] = replace(self._processes[name], **fields)  # type: ignore[arg-type]  # names are ours
        self.version += 1


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
