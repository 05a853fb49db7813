"""What operators ask of a gateway, at every door: how the deployment fares, and recordings of its work."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from echelon.pb import control_pb2, scheduler_pb2
from gateway.replicas.channel import is_asked_to_end
from gateway.replicas.events import EventLog
from gateway.replicas.replicas import read_replicas
from gateway.replicas.scheduler_link import SchedulerLink
from gateway.replicas.topology import Topology
from gateway.requests.refusal import Refusal, invalid

_TraceCall = grpc.aio.UnaryStreamCall[scheduler_pb2.TraceRequest, scheduler_pb2.TraceEvent]

_MAX_TRACE_S = 600.0
_MAX_TRACE_ROUNDS = 1_000_000
_MOST_REQUESTS = 100  # that are listed


class Operations:
    """On one gateway."""

    def __init__(
        self, links: Sequence[SchedulerLink], topology: Topology, events: EventLog, *, model_name: Callable[[], str]
    ) -> None:
        self._links = links
        self._topology = topology
        self._events = events
        self._model_name = model_name
        self._recordings: set[_TraceCall] = set()
        self._draining = False

    def end_recordings(self) -> None:
        """The gateway is about to stop and does not wait for a recording."""
        self._draining = True
        for call in self._recordings:
            call.cancel()

    async def status(self) -> control_pb2.GetReplicasResponse:
        """Of the deployment, asked of every scheduler now."""
        return control_pb2.GetReplicasResponse(
            model=self._model_name(),
            replicas=await read_replicas(self._links),
            processes=self._topology.processes,
            models=self._topology.models,
            events=self._events,
            requests=self._running_requests(),
        )

    def _running_requests(self) -> list[control_pb2.RunningRequest]:
        """The oldest ones."""
        running = [
            control_pb2.RunningRequest(
                request_id=request_id,
                replica=replica,
                tenant=progress.tenant,
                age_s=progress.age_s,
                num_prompt_tokens=progress.num_prompt_tokens,
                num_output_tokens=progress.num_output_tokens,
                waits=not progress.num_output_tokens,
            )
            for replica, link in enumerate(self._links)
            for request_id, progress in link.oldest(_MOST_REQUESTS)
        ]
        running.sort(key=lambda request: -request.age_s)
        return running[:_MOST_REQUESTS]

    @contextlib.asynccontextmanager
    async def recording(
        self, request: control_pb2.ReplicaTraceRequest
    ) -> AsyncIterator[AsyncIterator[scheduler_pb2.TraceEvent]]:
        """Its events, once it has begun; who leaves the block ends it. Raises Refusal, also inside the block."""
        self._check(request)
        call = self._links[request.replica].trace(request.trace)
        self._recordings.add(call)
        try:
            await call.initial_metadata()
            yield aiter(call)
        except grpc.aio.AioRpcError as err:
            raise Refusal(err.code(), err.details() or "") from err
        except asyncio.CancelledError:
            if self._draining:
                raise _shutting_down() from None
            if is_asked_to_end():
                raise
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the scheduler was started again") from None
        finally:
            self._recordings.discard(call)
            call.cancel()

    def _check(self, request: control_pb2.ReplicaTraceRequest) -> None:
        """Raises Refusal."""
        trace = request.trace
        if self._draining:
            raise _shutting_down()
        if request.replica >= len(self._links):
            raise invalid(f"replica: there is no {request.replica}; the last one is {len(self._links) - 1}")
        if trace.num_rounds > _MAX_TRACE_ROUNDS:
            raise invalid(f"trace.num_rounds: must be at most {_MAX_TRACE_ROUNDS}, got {trace.num_rounds}")
        if not (math.isfinite(trace.duration_s) and 0 <= trace.duration_s <= _MAX_TRACE_S):
            raise invalid(f"trace.duration_s: must be in [0, {_MAX_TRACE_S:g}], got {trace.duration_s:g}")


def _shutting_down() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "this gateway is shutting down")
