"""What a child process tells its parent: one ProcessEvent a line, as JSON, on standard output."""

import logging
import os
import sys
import threading
import time
import traceback
from typing import NoReturn, TextIO

from google.protobuf import json_format

from echelon.pb.process_pb2 import Failed, ProcessEvent, Progress, Ready, StoreOpened, Waiting
from echelon.pb.worker_pb2 import WorkerInfo

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
_MIN_PROGRESS_INTERVAL_S = 0.2


class EventWriter:
    """Events for the parent. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._stage = ""
        self._progress_at = 0.0

    @classmethod
    def on_stdout(cls) -> "EventWriter":
        """Takes standard output for events alone: from now on, what libraries print goes to standard error."""
        stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(stream)

    def waiting(self) -> None:
        self._write(ProcessEvent(waiting=Waiting()))

    def store_opened(self, address: str) -> None:
        self._write(ProcessEvent(store_opened=StoreOpened(address=address)))

    def progress(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Writes at most five a second, but always the first and the last of a stage."""
        now = time.monotonic()
        with self._lock:
            if stage == self._stage and done < total and now - self._progress_at < _MIN_PROGRESS_INTERVAL_S:
                return
            self._stage, self._progress_at = stage, now
        self._write(ProcessEvent(progress=Progress(stage=stage, done=done, total=total)))

    def ready(self, address: str, info: WorkerInfo | None = None, *, inside_address: str = "") -> None:
        ready = Ready(address=address, worker=info, inside_address=inside_address)
        self._write(ProcessEvent(ready=ready))

    def fail(self, error: str) -> NoReturn:
        """Writes the last event and ends the process, whatever its other threads wait for.

        Inside an except block, the traceback goes with the event.
        """
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
                logger.debug("the parent no longer reads events")
