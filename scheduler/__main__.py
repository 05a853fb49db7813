"""`python -m scheduler`: the process that protos/process.proto describes."""

import asyncio
import gc
from typing import Any

from childproc import edge
from childproc.events import EventWriter
from childproc.updates import Updates
from echelon.pb.process_pb2 import SchedulerSpec
from scheduler.process.server import SchedulerServer

# Neither time is measured.
_CONNECT_TIMEOUT_S = 30.0  # for the groups to be reached at a start
_DRAIN_GRACE_S = 30.0  # for running requests to end, and for KV to be written to disk


def main() -> None:
    updates = Updates()
    edge.run(SchedulerSpec, lambda spec, events: asyncio.run(_serve(spec, events, updates)), updates)


async def _serve(spec: SchedulerSpec, events: EventWriter, updates: Updates) -> None:
    stopped = edge.stop_signal()
    server = SchedulerServer(spec)
    updates.subscribe_on(asyncio.get_running_loop(), server.replica.on_update)
    # A round leaves garbage in proportion to its rows; by default Python would look for cycles every few rounds. With
    # 100,000, cycles of finished requests took 10 MB more.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    events.ready(await server.start(_CONNECT_TIMEOUT_S))
    ends: set[asyncio.Future[Any]] = {server.failure, asyncio.create_task(stopped.wait())}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if server.failure.done():
        server.failure.result()
    await server.stop(_DRAIN_GRACE_S)


if __name__ == "__main__":
    main()
