"""Services of ours on a grpc server: requests are decoded strictly, and a Refusal becomes the call's status."""

import inspect
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.requests.refusal import Refusal, invalid
from gateway.requests.wire import Malformed, strict_decoder

Context = grpc.aio.ServicerContext[Any, Any]
# A handler returns its reply or, where it streams, writes to the context or generates its replies. May raise Refusal.
_Handler = Callable[[Any, Context], Any]

# Of a request that is decoded on the event loop. Those of every method but Generate are tiny.
_MAX_BYTES = 1024
_MAX_FIELDS = 64


def service_handlers(
    service: ServiceDescriptor, servicer: object, *, undecoded: Collection[str] = ()
) -> "grpc.GenericRpcHandler[Any, Any]":
    """What the generated add_...Servicer_to_server makes, but malformed requests are refused with the field's name.

    The methods `undecoded` receive a request's bytes, whatever they are; those of others must be few.
    """
    handlers = {}
    for method in service.methods:
        handler = getattr(servicer, method.name, None)
        if handler is None:
            continue  # a newer method of a service that is not ours: UNIMPLEMENTED
        raw = method.name in undecoded
        strict = handler if raw else _refuse_malformed(handler, streamed=method.client_streaming)
        handlers[method.name] = _shape(method)(
            _abort_refused(strict),
            request_deserializer=None if raw else _decoder_of_small(GetMessageClass(method.input_type)),
            response_serializer=lambda message: message.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _shape(method: MethodDescriptor) -> Callable[..., "grpc.RpcMethodHandler[Any, Any]"]:
    if method.client_streaming:
        streams = method.server_streaming
        return grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
    return grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler


def _decoder_of_small(message_class: type[Message]) -> Callable[[bytes], Message | Malformed]:
    decode = strict_decoder(message_class, max_fields=_MAX_FIELDS)

    def decode_small(data: bytes) -> Message | Malformed:
        if len(data) > _MAX_BYTES:
            return Malformed(error=f"request: has {len(data)} bytes; this method takes at most {_MAX_BYTES}")
        return decode(data)

    return decode_small


def _refuse_malformed(handler: _Handler, *, streamed: bool) -> _Handler:
    async def handle(request: Any, context: Context) -> Any:
        return await handler(_well_formed(request), context)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        well_formed = _each_well_formed(request) if streamed else _well_formed(request)
        async for response in handler(well_formed, context):
            yield response

    return generate if inspect.isasyncgenfunction(handler) else handle


def _abort_refused(handler: _Handler) -> _Handler:
    async def handle(request: Any, context: Context) -> Any:
        try:
            return await handler(request, context)
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.message)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in handler(request, context):
                yield response
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.message)

    return generate if inspect.isasyncgenfunction(handler) else handle


def _well_formed(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise invalid(request.error)
    return request


async def _each_well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _well_formed(request)
