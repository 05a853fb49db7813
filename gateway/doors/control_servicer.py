"""The Control service: how the deployment fares, and traces of its work."""

from childproc.tokens_file import Scope
from echelon.pb import control_pb2
from gateway.access.tokens import Tokens
from gateway.doors.grpc_access import while_known
from gateway.doors.service_handlers import Context
from gateway.operations import Operations


class ControlServicer:
    """Serves every method of `echelon.v1.Control`. They raise Refusal."""

    def __init__(self, operations: Operations, tokens: Tokens) -> None:
        self._operations = operations
        self._tokens = tokens

    async def GetReplicas(
        self, request: control_pb2.GetReplicasRequest, context: Context
    ) -> control_pb2.GetReplicasResponse:
        return await self._operations.status()

    async def Trace(self, request: control_pb2.ReplicaTraceRequest, context: Context) -> None:
        async with self._operations.recording(request) as events:
            await context.send_initial_metadata(())  # it has begun
            async for event in while_known(events, context, self._tokens, Scope.ADMIN):
                await context.write(event)
