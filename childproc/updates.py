"""What a child process is told after its spec: one ProcessUpdate a line, as JSON, on standard input."""

import asyncio
import logging
import threading
from collections.abc import Callable

from google.protobuf import json_format

from echelon.pb.process_pb2 import ProcessUpdate

logger = logging.getLogger(__name__)


class Updates:
    """Keeps what the parent says until somebody wants it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line = b""
        self._waiting: list[ProcessUpdate] = []
        self._deliver: Callable[[ProcessUpdate], None] | None = None

    def feed(self, data: bytes) -> None:
        """Bytes of standard input, which may end anywhere in a line."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in filter(None, lines):
            try:
                update = json_format.Parse(line, ProcessUpdate())
            except json_format.ParseError as err:
                logger.error("the parent said something that is no update: %s", err)
                continue
            with self._lock:
                if self._deliver is None:
                    self._waiting.append(update)
                else:
                    self._deliver(update)

    def subscribe(self, deliver: Callable[[ProcessUpdate], None]) -> None:
        """Call `deliver` with each update, from the thread that reads standard input; it must not block."""
        with self._lock:
            for update in self._waiting:
                deliver(update)
            self._waiting.clear()
            self._deliver = deliver

    def subscribe_on(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[ProcessUpdate], None]) -> None:
        """Call `deliver` with each update, on an event loop."""

        def pass_on(update: ProcessUpdate) -> None:
            loop.call_soon_threadsafe(deliver, update)

        self.subscribe(pass_on)
