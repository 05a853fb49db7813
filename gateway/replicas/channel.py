"""The channel to a scheduler, and what is sent on its stream."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

import grpc

from childproc.wires import open_channel
from echelon.pb import scheduler_pb2, scheduler_pb2_grpc
from echelon.pb.process_pb2 import ProcessIdentity

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # from our own scheduler; prompt logprobs can be long
    ("grpc.initial_reconnect_backoff_ms", int(1e3 * MIN_BACKOFF_S)),
    ("grpc.min_reconnect_backoff_ms", int(1e3 * MIN_BACKOFF_S)),
    ("grpc.max_reconnect_backoff_ms", int(1e3 * MAX_BACKOFF_S)),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_scheduler(
    address: str, identity: ProcessIdentity | None
) -> "tuple[grpc.aio.Channel, scheduler_pb2_grpc.SchedulerAsyncStub]":
    channel = open_channel(address, *_OPTIONS, identity=identity)
    # The stubs' declarations know asynchronous methods under another name than the code does.
    return channel, cast("scheduler_pb2_grpc.SchedulerAsyncStub", scheduler_pb2_grpc.SchedulerStub(channel))


async def drain(
    queue: asyncio.Queue[scheduler_pb2.SchedulerRequest],
) -> AsyncIterator[scheduler_pb2.SchedulerRequest]:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            yield await queue.get()


def is_asked_to_end() -> bool:
    """Whether a CancelledError is meant for this task, and not only for the call that it waits for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
