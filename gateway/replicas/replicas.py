"""The status of the replicas, fetched on demand."""

import asyncio
from collections.abc import Sequence

import grpc

from echelon.pb import control_pb2
from gateway.replicas.scheduler_link import SchedulerLink


async def read_replicas(links: Sequence[SchedulerLink]) -> list[control_pb2.ReplicaStatus]:
    """The status of every replica, in order; `error` instead where one does not answer."""
    return list(await asyncio.gather(*(_read(replica, link) for replica, link in enumerate(links))))


async def _read(replica: int, link: SchedulerLink) -> control_pb2.ReplicaStatus:
    try:
        status = await link.read_status()
    except grpc.aio.AioRpcError as err:
        error = f"{err.code().name}: {err.details()}"
        return control_pb2.ReplicaStatus(replica=replica, address=link.address, error=error)
    return control_pb2.ReplicaStatus(replica=replica, address=link.address, status=status)
