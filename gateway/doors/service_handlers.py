"""Services of ours on a grpc server, with strict decoding of every request."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from gateway.doors.wire import Malformed, strict_decoder

Context = grpc.aio.ServicerContext[Any, Any]
# A handler may return its reply or, where it streams, write to the context.
_Handler = Callable[[Any, Context], Awaitable[Any]]


def service_handlers(service: ServiceDescriptor, servicer: object) -> "grpc.GenericRpcHandler[Any, Any]":
    """What the generated add_...Servicer_to_server makes, but malformed requests are refused with the field's name."""
    handlers = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            _refuse_malformed(getattr(servicer, method.name)),
            request_deserializer=strict_decoder(GetMessageClass(method.input_type)),
            response_serializer=lambda message: message.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _refuse_malformed(handler: _Handler) -> _Handler:
    async def handle(request: Any, context: Context) -> Any:
        if isinstance(request, Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.error)
        return await handler(request, context)

    return handle
