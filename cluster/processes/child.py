"""Child processes that speak `protos/process.proto`: a spec in on standard input, events out on standard output.

Standard library and stubs only, so that benchmarks and tests start the same processes without Ray.
"""

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from google.protobuf import json_format
from google.protobuf.message import Message

from cluster.errors import StartError
from echelon.pb.process_pb2 import ProcessEvent, ProcessUpdate

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
_TAIL_LINES = 30
_TAIL_BYTES = 16 << 10


class Child(Protocol):
    """A started process, wherever it runs. Methods may be called from several threads."""

    name: str
    pid: int | None  # None: its host has not started it yet
    devices: str  # what it was given, for people: "cuda:3", "cores 0-1"

    def next_event(self, timeout_s: float) -> ProcessEvent | None:
        """The next event, blocking; None when none came in time or the process has ended (then `poll` tells)."""
        ...

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        ...

    def tell(self, update: ProcessUpdate) -> None:
        """Write an update to its standard input, once it is ready; does nothing if it has ended."""
        ...

    def stop(self, grace_s: float) -> None:
        """End it and return when it is gone: SIGTERM, and SIGKILL after the grace; without a grace, SIGKILL at once."""
        ...

    def stderr_tail(self) -> str:
        """The last lines of its log."""
        ...


class ChildProcess:
    """`python -m <module>` as a child of this process. The child ends itself when this process dies."""

    def __init__(
        self,
        module: str,
        spec: Message | None,
        *,
        name: str,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        devices: str = "",
    ) -> None:
        """Start it.

        Args:
            module: what `python -m` runs, with this interpreter and the repository on PYTHONPATH.
            spec: written to its standard input as one line of JSON; None: `begin` does that.
            name: for messages, such as "target-0.1".
            log_path: file that takes its standard error; the folder is made, an older file is replaced.
            env: added to this process's environment.
            devices: what it may use, for people.

        Raises StartError where the operating system cannot start it.
        """
        self.name = name
        self.devices = devices
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_path.open("wb") as log:
                # A session of its own: Ctrl-C in the terminal reaches the parent, which stops its children in order.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(env or {}),
                    start_new_session=True,
                )
        except OSError as err:
            raise StartError(f"{name}: cannot start {sys.executable} -m {module}: {err}") from err
        self.pid: int | None = self._process.pid
        self._events: queue.SimpleQueue[ProcessEvent | None] = queue.SimpleQueue()  # None: standard output ended
        self._sending = threading.Lock()
        self.is_waiting = False  # for its spec, with all imported
        if spec is not None:
            self._send(spec)
        threading.Thread(target=self._read_events, name=f"events of {name}", daemon=True).start()

    def begin(self, spec: Message, *, log_path: Path, devices: str = "") -> None:
        """What the process was started for. Its log goes on under this name."""
        self.log_path.replace(log_path)
        self.log_path, self.devices = log_path, devices
        self._send(spec)

    def say(self, event: ProcessEvent) -> None:
        """Among the events of the process, what its parent knows of it."""
        self._events.put(event)

    def next_event(self, timeout_s: float) -> ProcessEvent | None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event is None:
            self._events.put(None)  # for the next caller
            try:
                self._process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                logger.debug("%s closed its standard output and keeps running", self.name)
        return event

    def poll(self) -> int | None:
        return self._process.poll()

    def tell(self, update: ProcessUpdate) -> None:
        self._send(update)

    def stop(self, grace_s: float) -> None:
        if self._process.poll() is None and grace_s > 0:
            self._process.terminate()
            try:
                self._process.wait(timeout=grace_s)
            except subprocess.TimeoutExpired:
                logger.warning(
                    "%s (pid %s) did not end within %s s of SIGTERM; killing it", self.name, self.pid, grace_s
                )
        # Also what it may have started: the session outlives its leader.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            logger.debug("%s left nothing behind", self.name)
        self._process.wait()
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._close_quietly(self._process.stdin)

    def stderr_tail(self) -> str:
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError as err:
            return f"(log {self.log_path} cannot be read: {err})"
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def _send(self, message: Message) -> None:
        """As one line. What it says is short enough for the pipe, so a child that does not read blocks nobody."""
        stdin = self._process.stdin
        assert stdin is not None, "stdin is a pipe"
        line = json_format.MessageToJson(message, indent=None).encode() + b"\n"
        try:
            with self._sending:
                stdin.write(line)
                stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: `stop` has closed it
            logger.debug("%s ended before it read this; its exit status and log say why", self.name)

    def _read_events(self) -> None:
        assert self._process.stdout is not None, "stdout is a pipe"
        with self._process.stdout as stdout:
            for line in stdout:
                self._on_line(line)
        self._events.put(None)

    def _on_line(self, line: bytes) -> None:
        try:
            event = json_format.Parse(line, ProcessEvent(), ignore_unknown_fields=True)
            if event.HasField("waiting"):
                self.is_waiting = True
            else:
                self._events.put(event)
        except json_format.ParseError:
            # A library that prints is a nuisance, not a reason to fail.
            logger.info("%s printed: %s", self.name, line.decode(errors="replace").rstrip())

    @staticmethod
    def _close_quietly(stream: IO[bytes]) -> None:
        try:
            stream.close()
        except BrokenPipeError:
            return  # unsent bytes for a process that is gone


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **extra}
