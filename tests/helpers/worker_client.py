"""Worker processes started by the test as `python -m workers`, and the scheduler's end of their streams."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf import json_format

from childproc.wires import open_blocking_channel
from echelon import __version__
from echelon.pb.process_pb2 import EngineSpec, ProcessEvent, Ready, WorkerSpec
from echelon.pb.worker_pb2 import EngineRole, Hello, MoveOrder, MoveResult, Round, RoundReply, RoundRequest, RoundResult
from echelon.pb.worker_pb2_grpc import WorkerStub
from tests.helpers.rounds import INCARNATION

ROOT = Path(__file__).parents[2]


class WorkerProcess:
    """One rank. Standard error goes to `log`, and a failing test shows its text."""

    def __init__(self, spec: WorkerSpec, log: Path) -> None:
        self.log = log
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "workers"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        self.write(json_format.MessageToJson(spec, indent=None) + "\n")

    def write(self, text: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(text)
        self.popen.stdin.flush()

    def close_stdin(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def next_event(self) -> ProcessEvent:
        """The next event that reports neither progress nor that the process came before its spec."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            event = json_format.Parse(line, ProcessEvent())
            if not (event.HasField("progress") or event.HasField("waiting")):
                return event
        raise AssertionError(f"ended with {self.popen.wait()} and no further event:\n{self.log.read_text()}")

    def next_ready(self) -> Ready:
        event = self.next_event()
        assert event.HasField("ready"), event
        return event.ready

    def next_failed(self) -> str:
        """The error of the last event; the process must end with the status of a failure."""
        event = self.next_event()
        assert event.HasField("failed"), event
        assert self.popen.wait() == 1
        return event.failed.error

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGCONT)  # a stopped process would not notice the end of its input
        self.popen.kill()
        self.popen.wait()


class WorkerGroup:
    """All ranks of a group; those that still run at the end of the `with` are killed."""

    def __init__(self, folder: Path, world_size: int, engines: Sequence[EngineSpec], **spec: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._spec = WorkerSpec(
            world_size=world_size,
            host="127.0.0.1",
            device="cpu",
            threads=1,
            incarnation=INCARNATION,
            version=__version__,
            engines=engines,
            collective_timeout_s=20.0,
        )
        self._spec.MergeFrom(WorkerSpec(**spec))
        self.ranks: list[WorkerProcess] = []

    def spawn(self) -> Self:
        """Starts all ranks and does not wait for them."""
        self._spawn_rank(0, "")
        if self._spec.world_size > 1:
            address = self.ranks[0].next_event().store_opened.address
            for rank in range(1, self._spec.world_size):
                self._spawn_rank(rank, address)
        return self

    def wait_ready(self) -> Self:
        self.ready = self.ranks[0].next_ready()
        for rank in self.ranks[1:]:
            assert rank.next_ready().address == ""
        return self

    def _spawn_rank(self, rank: int, store_address: str) -> None:
        spec = WorkerSpec()
        spec.CopyFrom(self._spec)
        spec.name, spec.rank, spec.store_address = f"test.{rank}", rank, store_address
        self.ranks.append(WorkerProcess(spec, self._folder / f"rank{rank}.log"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()


class RoundStream:
    """A stream of rounds and moves to one engine."""

    def __init__(self, address: str, role: EngineRole.ValueType, **hello: Any) -> None:
        self._requests: queue.SimpleQueue[RoundRequest | None] = queue.SimpleQueue()
        self._channel = open_blocking_channel(address)
        fields = {"role": role, "incarnation": INCARNATION, "version": __version__, **hello}
        self._requests.put(RoundRequest(hello=Hello(**fields)))
        self._replies = WorkerStub(self._channel).Rounds(self._iterate(), wait_for_ready=True)
        self._results: deque[RoundResult] = deque()  # that came while something else was awaited
        self._moved: dict[int, MoveResult] = {}
        self._disk: list[bytes] = []
        self._disk_is_known = False

    def send(self, round_: Round) -> None:
        self._requests.put(RoundRequest(round=round_))

    def send_move(self, order: MoveOrder) -> None:
        self._requests.put(RoundRequest(move=order))

    def receive(self) -> RoundResult:
        """The next result. Raises grpc.RpcError if the worker has ended the stream."""
        while not self._results:
            self._take_in(next(self._replies))
        return self._results.popleft()

    def receive_move(self, move_id: int) -> MoveResult:
        """The answer to this move. Raises as `receive`."""
        while move_id not in self._moved:
            self._take_in(next(self._replies))
        return self._moved.pop(move_id)

    def disk(self) -> list[bytes]:
        """What the disks of all ranks held when the stream began. Raises as `receive`."""
        while not self._disk_is_known:
            self._take_in(next(self._replies))
        return self._disk

    def call(self, round_: Round) -> RoundResult:
        self.send(round_)
        result = self.receive()
        assert (result.round_id, result.incarnation) == (round_.round_id, round_.incarnation)
        return result

    def half_close(self) -> None:
        self._requests.put(None)

    def rest(self) -> list[RoundResult]:
        for reply in self._replies:
            self._take_in(reply)
        return list(self._results)

    def ending(self) -> tuple[grpc.StatusCode, str]:
        """The error with which the worker ends the stream."""
        try:
            result = self.receive()
        except grpc.RpcError as err:
            return err.code(), err.details()
        raise AssertionError(f"the stream goes on with {result}")

    def _take_in(self, reply: RoundReply) -> None:
        if reply.HasField("result"):
            self._results.append(reply.result)
        elif reply.HasField("move"):
            self._moved[reply.move.move_id] = reply.move
        else:
            self._disk += reply.disk.digests
            self._disk_is_known = reply.disk.is_last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._channel.close()

    def _iterate(self) -> Iterator[RoundRequest]:
        while (request := self._requests.get()) is not None:
            yield request
