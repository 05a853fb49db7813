"""The Inference service: requests over gRPC."""

import time

import echelon
from childproc.tokens_file import Scope
from echelon.pb import inference_pb2, scheduler_pb2
from gateway.access.caller import Caller
from gateway.access.tokens import Tokens
from gateway.core import Core
from gateway.doors.grpc_access import caller_of
from gateway.doors.service_handlers import Context
from gateway.models import Models
from gateway.requests.forms import Form
from gateway.requests.refusal import Refusal, invalid

# Says that the request has failed. Without it UNAVAILABLE means that the gateway was lost, and a client may resume.
_FINAL = (("echelon-final", "1"),)


class InferenceServicer:
    """Serves every method of `echelon.v1.Inference`. They raise Refusal."""

    def __init__(self, core: Core, models: Models, tokens: Tokens) -> None:
        self._core = core
        self._tokens = tokens
        self._models = models
        self._started_at = time.monotonic()

    async def Generate(self, request: bytes, context: Context) -> None:
        arrived_s = self._core.now()
        try:
            (submit,) = (await self._core.read(Form.GENERATE, request)).submits
            caller, remaining_s = self._caller(context), context.time_remaining()
            async with self._core.run([submit], caller, arrived_s=arrived_s, remaining_s=remaining_s) as replies:
                await context.write(_started(submit))
                async for _, reply in replies:
                    await context.write(_response(submit.request_id, reply))
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.message, trailing_metadata=_FINAL)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Context) -> inference_pb2.CancelResponse:
        if not request.request_id:
            raise invalid("request_id: is empty")
        link = self._core.link_of(request.request_id, self._caller(context))
        if link is not None:
            link.cancel(request.request_id)
        return inference_pb2.CancelResponse(found=link is not None)

    async def SetSpeculation(
        self, request: inference_pb2.SetSpeculationRequest, context: Context
    ) -> inference_pb2.SetSpeculationResponse:
        if not request.request_id:
            raise invalid("request_id: is empty")
        link = self._core.link_of(request.request_id, self._caller(context))
        if link is not None:
            link.adjust(request.request_id, request.speculation)
        return inference_pb2.SetSpeculationResponse(found=link is not None)

    def _caller(self, context: Context) -> Caller:
        """Raises Refusal where the token was revoked since the call came."""
        return caller_of(context.invocation_metadata(), self._tokens, Scope.GENERATE)

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.ModelInfo:
        return self._models.info

    async def GetServerInfo(
        self, request: inference_pb2.GetServerInfoRequest, context: Context
    ) -> inference_pb2.ServerInfo:
        return inference_pb2.ServerInfo(
            version=echelon.__version__,
            uptime_s=time.monotonic() - self._started_at,
            num_replicas=self._core.num_replicas,
            num_ready_replicas=self._core.num_ready_replicas,
        )


def _started(submit: scheduler_pb2.Submit) -> inference_pb2.GenerateResponse:
    started = inference_pb2.GenerateStarted(seed=submit.sampling.seed, model_id=submit.model_id)
    return inference_pb2.GenerateResponse(request_id=submit.request_id, started=started)


def _response(
    request_id: str, reply: inference_pb2.GenerateChunk | inference_pb2.GenerateComplete
) -> inference_pb2.GenerateResponse:
    if isinstance(reply, inference_pb2.GenerateChunk):
        return inference_pb2.GenerateResponse(request_id=request_id, chunk=reply)
    return inference_pb2.GenerateResponse(request_id=request_id, complete=reply)
