"""The process protocol of protos/process.proto: spec in on standard input, events out on standard output."""

import logging
import os
import sys
import threading
import time
import traceback
from typing import BinaryIO, NoReturn, TextIO

from google.protobuf import json_format

from echelon import __version__
from echelon.pb.process_pb2 import Failed, ProcessEvent, Progress, Ready, StoreOpened, WorkerSpec
from echelon.pb.worker_pb2 import WorkerInfo

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_PARENT_DIED = 3
MIN_PROGRESS_INTERVAL_S = 0.2
DEFAULT_COLLECTIVE_TIMEOUT_S = 30.0


class SpecError(ValueError):
    """What the parent asks for cannot be started."""


def read_spec(stdin: BinaryIO) -> WorkerSpec:
    """The worker's spec, from one line of JSON.

    Raises:
        SpecError: It is no spec, or that of another version of Echelon.
    """
    line = stdin.readline()
    try:
        spec = json_format.Parse(line, WorkerSpec())
    except json_format.ParseError as err:
        raise SpecError(f"standard input must start with a WorkerSpec as one line of JSON: {err}") from err
    if spec.version != __version__:
        raise SpecError(
            f"the controller runs Echelon {spec.version or '(no version)'}, this worker {__version__}: "
            "install one version everywhere"
        )
    if not spec.engines:
        raise SpecError("engines: is empty, a worker runs one or more")
    if spec.rank >= max(1, spec.world_size):
        raise SpecError(f"rank: {spec.rank}, must be below world_size {spec.world_size}")
    spec.collective_timeout_s = spec.collective_timeout_s or DEFAULT_COLLECTIVE_TIMEOUT_S
    return spec


def exit_with_parent(stdin: BinaryIO) -> None:
    """From now on the end of standard input ends this process at once: nothing may outlive its parent."""

    def watch() -> None:
        while stdin.read(1):
            pass
        logger.warning("standard input ended: the parent died")
        os._exit(EXIT_PARENT_DIED)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def configure_logging(name: str) -> None:
    """Logs of this process go to standard error, with the name of the rank."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s %(levelname).1s {name} %(name)s: %(message)s"
    )


class EventWriter:
    """Events for the parent. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._stage = ""
        self._progress_at = 0.0

    @classmethod
    def on_stdout(cls) -> "EventWriter":
        """Takes standard output for events alone: what libraries print goes to standard error from now on."""
        stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(stream)

    def store_opened(self, address: str) -> None:
        self._write(ProcessEvent(store_opened=StoreOpened(address=address)))

    def progress(self, stage: str, done: int, total: int) -> None:
        """At most five a second, but always the first and the last of a stage."""
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._progress_at < MIN_PROGRESS_INTERVAL_S:
            return
        self._stage, self._progress_at = stage, now
        self._write(ProcessEvent(progress=Progress(stage=stage, done=done, total=total)))

    def ready(self, address: str, info: WorkerInfo) -> None:
        self._write(ProcessEvent(ready=Ready(address=address, worker=info)))

    def fail(self, error: str) -> NoReturn:
        """The last event; ends the process, whatever its other threads wait for. Inside an except block the traceback
        goes along. Never returns."""
        detail = traceback.format_exc() if sys.exception() is not None else ""
        logger.error("%s", error)
        self._write(ProcessEvent(failed=Failed(error=error, detail=detail)))
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def _write(self, event: ProcessEvent) -> None:
        line = json_format.MessageToJson(event, indent=None)
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except BrokenPipeError:
                logger.debug("the parent does not read events any more")
