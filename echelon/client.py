"""The typed Python client, synchronous and asynchronous.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("def quicksort(", max_tokens=64, temperature=0).text)
        for chunk in client.stream("def quicksort(", max_tokens=64):
            print(chunk.text, end="", flush=True)

Both clients take the same arguments and raise the same errors (`echelon.errors`); one client serves any number of
calls at once. A stream that is closed, abandoned after an exception or garbage-collected cancels its request.
"""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn, Protocol, Self, Unpack, cast

import grpc

from echelon.channel import channel_options
from echelon.errors import error_from_status
from echelon.pb import inference_pb2, inference_pb2_grpc
from echelon.requests import (
    ChatMessage,
    GenerateOptions,
    Prompt,
    SpeculationOptions,
    build_request,
    build_speculation,
)
from echelon.results import Chunk, Completion, CompletionBuilder, ModelInfo, ServerInfo

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),  # the server's limit counts, and names itself
    ("grpc.keepalive_time_ms", 30_000),  # a server whose machine vanished is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
)
CLOSE_TIMEOUT_S = 2.0


class _Call(Protocol):
    """What the sync stub returns for a stream, as far as it is used here."""

    def __next__(self) -> inference_pb2.GenerateResponse: ...

    def cancel(self) -> object: ...


class Stream:
    """The chunks of one request as they come. Iterate, or ask for `result()`; a context manager closes it."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._builder = CompletionBuilder()

    @property
    def request_id(self) -> str:
        """Known once the first message has come; empty before."""
        return self._builder.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunk = None
        while chunk is None:  # StopIteration, with the status, follows the completion
            try:
                chunk = self._builder.add(next(self._call))
            except grpc.RpcError as err:
                _raise_from(err)
        return chunk

    def result(self) -> Completion:
        """Reads what is left and returns everything."""
        for _ in self:
            pass
        return self._builder.result()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStream:
    """`Stream` for asyncio."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"):
        self._call = call
        self._builder = CompletionBuilder()

    @property
    def request_id(self) -> str:
        """Known once the first message has come; empty before."""
        return self._builder.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = None
        while chunk is None:
            try:
                response = await self._call.read()
            except grpc.RpcError as err:
                _raise_from(err)
            if response is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
                raise StopAsyncIteration
            chunk = self._builder.add(cast(inference_pb2.GenerateResponse, response))
        return chunk

    async def result(self) -> Completion:
        """Reads what is left and returns everything."""
        async for _ in self:
            pass
        return self._builder.result()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to a gateway at `address`, host:port. Connects when first used; safe to share among threads."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=channel_options(address, *_CHANNEL_OPTIONS))
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Starts a request and returns its chunks as they come. Keywords are those of `GenerateOptions`."""
        request = build_request(prompt, options)
        return Stream(cast(_Call, self._stub.Generate(request, timeout=options.get("timeout_s"))))

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a request to its end."""
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a conversation through the model's chat template and returns the answer."""
        return self.generate(messages, **options)

    def cancel(self, request_id: str) -> bool:
        """Ends a running request, whose stream completes with finish reason "abort". False if there is none."""
        try:
            return self._stub.Cancel(inference_pb2.CancelRequest(request_id=request_id)).found
        except grpc.RpcError as err:
            _raise_from(err)

    def set_speculation(self, request_id: str, **options: Unpack[SpeculationOptions]) -> bool:
        """Changes how a running request speculates, from its next round on; its tokens stay the same. Keywords are
        those of `SpeculationOptions` and replace the earlier ones; without any, the deployment's settings apply.
        False if no such request runs."""
        request = inference_pb2.SetSpeculationRequest(request_id=request_id, speculation=build_speculation(options))
        try:
            return self._stub.SetSpeculation(request).found
        except grpc.RpcError as err:
            _raise_from(err)

    def model_info(self) -> ModelInfo:
        try:
            return _model_info(self._stub.GetModelInfo(inference_pb2.GetModelInfoRequest()))
        except grpc.RpcError as err:
            _raise_from(err)

    def server_info(self) -> ServerInfo:
        try:
            return _server_info(self._stub.GetServerInfo(inference_pb2.GetServerInfoRequest()))
        except grpc.RpcError as err:
            _raise_from(err)

    def close(self) -> None:
        """Cancels what is running and disconnects."""
        # grpc cancels its calls and waits until they have ended. A KeyboardInterrupt that strikes while a call is being
        # started leaves one that nobody will see ending: Ctrl-C would hang here for ever.
        closing = threading.Thread(target=self._channel.close, name="close channel", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio; `stream` needs no await, what comes from it does."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=channel_options(address, *_CHANNEL_OPTIONS))
        # The stubs' declarations know asynchronous methods under another name than the code does.
        self._stub = cast("inference_pb2_grpc.InferenceAsyncStub", inference_pb2_grpc.InferenceStub(self._channel))

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Starts a request and returns its chunks as they come. Keywords are those of `GenerateOptions`."""
        request = build_request(prompt, options)
        return AsyncStream(self._stub.Generate(request, timeout=options.get("timeout_s")))

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a request to its end."""
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    async def chat(self, messages: Sequence[ChatMessage], **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a conversation through the model's chat template and returns the answer."""
        return await self.generate(messages, **options)

    async def cancel(self, request_id: str) -> bool:
        """Ends a running request, whose stream completes with finish reason "abort". False if there is none."""
        try:
            return (await self._stub.Cancel(inference_pb2.CancelRequest(request_id=request_id))).found
        except grpc.RpcError as err:
            _raise_from(err)

    async def set_speculation(self, request_id: str, **options: Unpack[SpeculationOptions]) -> bool:
        """Changes how a running request speculates, from its next round on; its tokens stay the same. Keywords are
        those of `SpeculationOptions` and replace the earlier ones; without any, the deployment's settings apply.
        False if no such request runs."""
        request = inference_pb2.SetSpeculationRequest(request_id=request_id, speculation=build_speculation(options))
        try:
            return (await self._stub.SetSpeculation(request)).found
        except grpc.RpcError as err:
            _raise_from(err)

    async def model_info(self) -> ModelInfo:
        try:
            return _model_info(await self._stub.GetModelInfo(inference_pb2.GetModelInfoRequest()))
        except grpc.RpcError as err:
            _raise_from(err)

    async def server_info(self) -> ServerInfo:
        try:
            return _server_info(await self._stub.GetServerInfo(inference_pb2.GetServerInfoRequest()))
        except grpc.RpcError as err:
            _raise_from(err)

    async def close(self) -> None:
        """Cancels what is running and disconnects."""
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _raise_from(err: grpc.RpcError) -> NoReturn:
    """grpc's errors are calls at the same time, which their base class does not say."""
    call = cast(grpc.Call, err)
    raise error_from_status(call.code(), call.details()) from err


def _model_info(info: inference_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        model=info.model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        has_chat_template=info.has_chat_template,
    )


def _server_info(info: inference_pb2.ServerInfo) -> ServerInfo:
    return ServerInfo(
        version=info.version,
        uptime_s=info.uptime_s,
        num_replicas=info.num_replicas,
        num_ready_replicas=info.num_ready_replicas,
    )
