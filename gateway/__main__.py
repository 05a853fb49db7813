"""`python -m gateway`: the process around a Gateway, as protos/process.proto describes it."""

import asyncio

from childproc import edge
from childproc.events import EventWriter
from echelon.pb.process_pb2 import GatewaySpec
from gateway.server import Gateway

_DRAIN_GRACE_S = 30.0


def main() -> None:
    edge.run(GatewaySpec, lambda spec, events: asyncio.run(_serve(spec, events)))


async def _serve(spec: GatewaySpec, events: EventWriter) -> None:
    stop = edge.stop_signal()
    gateway = Gateway(spec)
    address = await gateway.start()
    gateway.open_reader()
    events.progress("waiting for the scheduler")
    stopped = asyncio.create_task(stop.wait())
    ready = asyncio.create_task(gateway.wait_until_ready())
    await asyncio.wait((stopped, ready), return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        events.ready(address)
    await stopped
    await gateway.drain(_DRAIN_GRACE_S)
    ready.cancel()


if __name__ == "__main__":
    main()
