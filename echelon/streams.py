"""The chunks of one request as they come, for blocking and for asynchronous callers."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Protocol, Self, TypeAlias, cast

import grpc

from echelon.errors import error_from_call
from echelon.pb.inference_pb2 import GenerateRequest, GenerateResponse
from echelon.results import Chunk, Completion
from echelon.resuming import FINAL_KEY, ResumableRequest
from echelon.rotation import Rotation


class Call(Protocol):
    """What the blocking stub returns for a stream, as far as it is used here."""

    def __next__(self) -> GenerateResponse: ...

    def cancel(self) -> object: ...


AsyncCall: TypeAlias = "grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]"
# Sends a request to the gateway at an address; the last argument is its timeout in seconds.
Open = Callable[[str, GenerateRequest, float | None], Call]
OpenAsync: TypeAlias = "Callable[[str, GenerateRequest, float | None], AsyncCall]"


class Stream:
    """Iterate, or ask for `result()`; a context manager closes it. If the gateway is lost, the stream pauses and goes
    on with the next one."""

    def __init__(self, request: ResumableRequest, open_call: Open, gateways: Rotation) -> None:
        self._request = request
        self._open = open_call
        self._gateways = gateways
        self._address = gateways.current
        self._closed = threading.Event()
        self._call = open_call(self._address, request.message(), request.remaining_s())

    @property
    def request_id(self) -> str:
        """Known once the first message has come; empty before."""
        return self._request.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunk = None
        while chunk is None:  # StopIteration, with the status, follows the completion
            try:
                chunk = self._request.on_message(next(self._call))
            except grpc.RpcError as err:
                self._go_on_after(err)
        return chunk

    def result(self) -> Completion:
        """Reads the rest and returns everything."""
        for _ in self:
            pass
        return self._request.result()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._closed.set()
        self._call.cancel()

    def _go_on_after(self, err: grpc.RpcError) -> None:
        delay_s = _delay_after(err, self._request)
        if delay_s is None or self._closed.wait(delay_s):
            raise error_from_call(err, self._address) from err
        self._gateways.leave(self._address)
        self._address = self._gateways.current
        self._call = self._open(self._address, self._request.message(), self._request.remaining_s())
        if self._closed.is_set():  # meanwhile, by another thread
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the first call was not opened
            self.close()


class AsyncStream:
    """`Stream` for asyncio."""

    def __init__(self, request: ResumableRequest, open_call: OpenAsync, gateways: Rotation) -> None:
        self._request = request
        self._open = open_call
        self._gateways = gateways
        self._address = gateways.current
        self._is_closed = False
        self._call = open_call(self._address, request.message(), request.remaining_s())

    @property
    def request_id(self) -> str:
        """Known once the first message has come; empty before."""
        return self._request.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = None
        while chunk is None:
            try:
                response = await self._call.read()
            except grpc.RpcError as err:
                await self._go_on_after(err)
                continue
            if response is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
                raise StopAsyncIteration
            chunk = self._request.on_message(cast(GenerateResponse, response))
        return chunk

    async def result(self) -> Completion:
        """Reads the rest and returns everything."""
        async for _ in self:
            pass
        return self._request.result()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._is_closed = True
        self._call.cancel()

    async def _go_on_after(self, err: grpc.RpcError) -> None:
        delay_s = _delay_after(err, self._request)
        if delay_s is None:
            raise error_from_call(err, self._address) from err
        await asyncio.sleep(delay_s)
        if self._is_closed:
            raise error_from_call(err, self._address) from err
        self._gateways.leave(self._address)
        self._address = self._gateways.current
        self._call = self._open(self._address, self._request.message(), self._request.remaining_s())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the first call was not opened
            self.close()


def _delay_after(err: grpc.RpcError, request: ResumableRequest) -> float | None:
    call = cast(grpc.Call, err)
    is_final = any(key == FINAL_KEY for key, _ in call.trailing_metadata() or ())
    return request.delay_after(call.code(), is_final=is_final)
