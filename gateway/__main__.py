"""`python -m gateway`: the process around a Gateway, as protos/process.proto describes it."""

import asyncio
import logging
import os
import signal
import sys
import threading
import traceback

from google.protobuf import json_format

from echelon.pb import process_pb2
from gateway.server import Gateway, StartupError

DRAIN_GRACE_S = 30.0


def main() -> int:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s gateway %(levelname)s %(name)s: %(message)s"
    )
    try:
        spec = json_format.Parse(sys.stdin.buffer.readline(), process_pb2.GatewaySpec())
        threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
        asyncio.run(_serve(spec))
    except (StartupError, ValueError, json_format.ParseError) as err:
        _emit(failed=process_pb2.Failed(error=f"gateway: {err}", detail=traceback.format_exc()))
        return 1
    except Exception as err:  # the edge of the process: whatever it is, the parent must hear of it
        logging.getLogger(__name__).exception("the gateway died")
        _emit(failed=process_pb2.Failed(error=f"gateway: {type(err).__name__}: {err}", detail=traceback.format_exc()))
        return 1
    return 0


async def _serve(spec: process_pb2.GatewaySpec) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    gateway = Gateway(spec)
    address = await gateway.start()
    _emit(progress=process_pb2.Progress(stage="waiting for the scheduler"))
    stopped = asyncio.create_task(stop.wait())
    ready = asyncio.create_task(gateway.wait_until_ready())
    await asyncio.wait((stopped, ready), return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        _emit(ready=process_pb2.Ready(address=address))
    await stopped
    await gateway.drain(DRAIN_GRACE_S)
    ready.cancel()


def _emit(**event: process_pb2.Progress | process_pb2.Ready | process_pb2.Failed) -> None:
    line = json_format.MessageToJson(process_pb2.ProcessEvent(**event), indent=None)  # type: ignore[arg-type]
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _exit_with_parent() -> None:
    """The parent holds our standard input open: its end is the parent's. Reads the descriptor itself, since a thread
    inside sys.stdin would abort the interpreter's own exit."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
