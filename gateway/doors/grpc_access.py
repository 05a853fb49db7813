"""What the gRPC port asks of callers: a certificate for the connection, a token for each call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import grpc

from childproc.tls_identity import TlsIdentity
from childproc.tokens_file import Scope
from gateway.access.caller import Caller
from gateway.access.tls_files import TlsFiles
from gateway.access.tokens import Tokens
from gateway.doors.service_handlers import Context
from gateway.requests.refusal import Refusal

T = TypeVar("T")

_Metadata = Any  # pairs; grpc's own types differ between its versions
_FREE = "grpc.health.v1.Health"  # load balancers ask it
_OPERATORS = "echelon.v1.Control"
_CHECK_S = 1.0


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses a call before its message is read."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any]"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        scope = _scope_of(handler_call_details.method)
        try:
            if scope is not None:
                caller_of(handler_call_details.invocation_metadata, self._tokens, scope)
        except Refusal as refusal:
            return _refuse(refusal)
        return await continuation(handler_call_details)


def caller_of(metadata: _Metadata, tokens: Tokens, scope: Scope) -> Caller:
    """Raises Refusal."""
    given = {key: value for key, value in metadata or () if key == "authorization"}
    return tokens.caller(given.get("authorization"), scope)


async def while_known(items: AsyncIterator[T], context: Context, tokens: Tokens, scope: Scope) -> AsyncIterator[T]:
    """The items of an answer that may go on for long. Raises Refusal once the caller's token is revoked."""
    check = partial(caller_of, context.invocation_metadata(), tokens, scope)
    while True:
        item = asyncio.ensure_future(anext(items))
        try:
            while not item.done():
                await asyncio.wait((item,), timeout=_CHECK_S)
                check()
            yield item.result()
        except StopAsyncIteration:
            return
        finally:
            item.cancel()


def tls_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Of a port whose files may change: each new connection sees the newest."""
    used = files.identity()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """None: the same as before."""
        nonlocal used
        newest, before = files.identity(), used
        used = newest
        return None if newest is before else _configuration(newest)

    # The stubs do not know that None is an answer.
    return grpc.dynamic_ssl_server_credentials(_configuration(used), fetch, used.client_ca is not None)  # type: ignore[arg-type]


def _configuration(identity: TlsIdentity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.cert)], identity.client_ca)


def _scope_of(method: str) -> Scope | None:
    """None: no token is needed."""
    service = method.removeprefix("/").partition("/")[0]
    if service == _FREE:
        return None
    return Scope.ADMIN if service == _OPERATORS else Scope.GENERATE


def _refuse(refusal: Refusal) -> "grpc.RpcMethodHandler[Any, Any]":
    async def abort(requests: Any, context: Context) -> None:
        await context.abort(refusal.code, refusal.message)

    return grpc.stream_stream_rpc_method_handler(abort)  # it waits for no message, whatever the method's own kind
