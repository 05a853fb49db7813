"""The Control service: the status of the replicas, and traces of their work."""

import asyncio
import math
from collections.abc import Sequence

import grpc

from echelon.pb import control_pb2, scheduler_pb2
from gateway.doors.service_handlers import Context
from gateway.replicas.replicas import read_replicas
from gateway.replicas.scheduler_link import SchedulerLink

_TraceCall = grpc.aio.UnaryStreamCall[scheduler_pb2.TraceRequest, scheduler_pb2.TraceEvent]

_MAX_TRACE_S = 600.0
_MAX_TRACE_ROUNDS = 1_000_000
_SHUTTING_DOWN = "this gateway is shutting down"


class ControlServicer:
    """Serves every method of `echelon.v1.Control`."""

    def __init__(self, links: Sequence[SchedulerLink], *, model_name: str) -> None:
        self._links = links
        self._model_name = model_name
        self._recordings: set[_TraceCall] = set()
        self._draining = False

    def end_recordings(self) -> None:
        """The gateway is about to stop and does not wait for a recording."""
        self._draining = True
        for call in self._recordings:
            call.cancel()

    async def GetReplicas(
        self, request: control_pb2.GetReplicasRequest, context: Context
    ) -> control_pb2.GetReplicasResponse:
        replicas = await read_replicas(self._links)
        return control_pb2.GetReplicasResponse(model=self._model_name, replicas=replicas)

    async def Trace(self, request: control_pb2.ReplicaTraceRequest, context: Context) -> None:
        refusal = self._refusal_of(request)
        if refusal is not None:
            await context.abort(*refusal)
        call = self._links[request.replica].trace(request.trace)
        self._recordings.add(call)
        try:
            await call.initial_metadata()
            await context.send_initial_metadata(())  # it has begun
            async for event in call:
                await context.write(event)
        except grpc.aio.AioRpcError as err:
            await context.abort(err.code(), err.details() or "")
        except asyncio.CancelledError:
            if not self._draining:
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN)
        finally:
            self._recordings.discard(call)
            call.cancel()

    def _refusal_of(self, request: control_pb2.ReplicaTraceRequest) -> tuple[grpc.StatusCode, str] | None:
        if self._draining:
            return grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN
        problem = self._problem_of(request)
        return (grpc.StatusCode.INVALID_ARGUMENT, problem) if problem else None

    def _problem_of(self, request: control_pb2.ReplicaTraceRequest) -> str:
        """Empty: none."""
        trace = request.trace
        if request.replica >= len(self._links):
            return f"replica: there is no {request.replica}; the last one is {len(self._links) - 1}"
        if trace.num_rounds > _MAX_TRACE_ROUNDS:
            return f"trace.num_rounds: must be at most {_MAX_TRACE_ROUNDS}, got {trace.num_rounds}"
        if not (math.isfinite(trace.duration_s) and 0 <= trace.duration_s <= _MAX_TRACE_S):
            return f"trace.duration_s: must be in [0, {_MAX_TRACE_S:g}], got {trace.duration_s:g}"
        return ""
