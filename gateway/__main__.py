"""`python -m gateway`: the process around a Gateway, as protos/process.proto describes it."""

import asyncio
import gc

from childproc import edge
from childproc.events import EventWriter
from childproc.updates import Updates
from echelon.pb.process_pb2 import GatewaySpec
from gateway.server import Gateway

_DRAIN_GRACE_S = 30.0


def main() -> None:
    updates = Updates()
    edge.run(GatewaySpec, lambda spec, events: asyncio.run(_serve(spec, events, updates)), updates)


async def _serve(spec: GatewaySpec, events: EventWriter, updates: Updates) -> None:
    stop = edge.stop_signal()
    gateway = Gateway(spec)
    updates.subscribe_on(asyncio.get_running_loop(), gateway.on_update)
    address = await gateway.start()
    gateway.open_reader()
    # What is there now stays: without this, each full collection walks over it, 25 ms in which all streams wait.
    gc.freeze()
    events.progress("waiting for the scheduler")
    stopped = asyncio.create_task(stop.wait())
    ready = asyncio.create_task(gateway.wait_until_ready())
    await asyncio.wait((stopped, ready), return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        events.ready(address, inside_address=gateway.inside_address)
    await stopped
    await gateway.drain(_DRAIN_GRACE_S)
    ready.cancel()


if __name__ == "__main__":
    main()
