"""`python -m scheduler`: the process that protos/process.proto describes."""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from typing import Any

from google.protobuf import json_format

from echelon.pb import process_pb2
from scheduler.config import ConfigError
from scheduler.process.server import SchedulerServer
from scheduler.requests.detokenizer import UnsupportedTokenizerError

_CONNECT_TIMEOUT_S = 30.0
_DRAIN_GRACE_S = 30.0


def _say(event: process_pb2.ProcessEvent) -> None:
    sys.stdout.write(json_format.MessageToJson(event, indent=None) + "\n")
    sys.stdout.flush()


def _fail(error: str, detail: str) -> int:
    _say(process_pb2.ProcessEvent(failed=process_pb2.Failed(error=error, detail=detail)))
    return 1


def _exit_with_parent() -> None:
    """Standard input ends when the parent dies; nobody is left to drain for."""
    # Not sys.stdin: its lock, held by a daemon thread, aborts the interpreter's own shutdown.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


async def _serve(spec: process_pb2.SchedulerSpec) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = SchedulerServer(spec)
    # Rounds make garbage in proportion to their rows; the default would look for cycles in every few of them.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    address = await server.start(_CONNECT_TIMEOUT_S)
    _say(process_pb2.ProcessEvent(ready=process_pb2.Ready(address=address)))
    ends: set[asyncio.Future[Any]] = {server.failure, asyncio.create_task(stopped.wait())}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if server.failure.done():
        server.failure.result()
    await server.stop(_DRAIN_GRACE_S)


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    line = sys.stdin.buffer.readline()
    try:
        spec = json_format.Parse(line, process_pb2.SchedulerSpec())
    except json_format.ParseError as error:
        return _fail(f"standard input holds no SchedulerSpec: {error}", "")
    threading.Thread(target=_exit_with_parent, name="stdin", daemon=True).start()
    try:
        asyncio.run(_serve(spec))
    except (ConfigError, UnsupportedTokenizerError) as error:
        return _fail(str(error), traceback.format_exc())
    except Exception as error:
        logging.getLogger(__name__).exception("scheduler failed")
        return _fail(f"{type(error).__name__}: {error}", traceback.format_exc())
    return 0


if __name__ == "__main__":
    sys.exit(main())
