"""The typed Python client, synchronous and asynchronous.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("def quicksort(", max_tokens=64, temperature=0).text)
        for chunk in client.stream("def quicksort(", max_tokens=64):
            print(chunk.text, end="", flush=True)

Both clients take the same arguments and raise the same errors (`echelon.errors`); one client serves any number of
calls at once. A stream that is closed, abandoned after an exception or garbage-collected cancels its request. One whose
gateway is lost goes on where it was as soon as a gateway answers again.
"""

import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack, cast

import grpc

from echelon.channel import Tls, metadata, open_async_channel, open_channel
from echelon.errors import UnavailableError, error_from_call
from echelon.jobs import AsyncJobsClient, JobsClient
from echelon.pb import inference_pb2, inference_pb2_grpc
from echelon.requests import (
    ChatMessage,
    GenerateOptions,
    Prompt,
    SpeculationOptions,
    build_request,
    build_speculation,
)
from echelon.results import Completion, ModelInfo, ServerInfo
from echelon.resuming import ResumableRequest
from echelon.rotation import Rotation
from echelon.streams import AsyncCall, AsyncStream, Call, Stream

T = TypeVar("T")

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),  # the server's limit counts, and names itself
    ("grpc.keepalive_time_ms", 30_000),  # a server whose machine vanished is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a gateway that was lost is soon back
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
CLOSE_TIMEOUT_S = 2.0
_RESUME_WITHIN_S = 60.0  # what starting a gateway again takes, and patience


class _Finding(Protocol):
    """The answer to a question about one request."""

    found: bool


class Client:
    """A connection to a gateway at `address`, host:port. Connects when first used; safe to share among threads.

    Several addresses, in a list or separated by commas, are those of the gateways of one deployment: when one does not
    answer, the next is tried. `token` is what the operator gave you, if gateways ask for one; `tls` is for gateways
    that speak TLS. A stream whose gateway is lost pauses and goes on, unless none answers for `resume_within_s`; 0: it
    fails at once.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        token: str | None = None,
        tls: Tls | None = None,
        resume_within_s: float = _RESUME_WITHIN_S,
    ) -> None:
        self._gateways = Rotation(address)
        self._resume_within_s = resume_within_s
        self._metadata = metadata(token)
        self._channels = {each: open_channel(each, tls, *_CHANNEL_OPTIONS) for each in self._gateways.addresses}
        self._stubs = {each: inference_pb2_grpc.InferenceStub(channel) for each, channel in self._channels.items()}
        first = self._gateways.addresses[0]  # which keeps the jobs
        self.jobs = JobsClient(self._channels[first], first, self._metadata)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Starts a request and returns its chunks as they come. Keywords are those of `GenerateOptions`."""
        request = _resumable(prompt, options, self._resume_within_s, len(self._gateways.addresses))
        return Stream(request, self._open, self._gateways)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a request to its end."""
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a conversation through the model's chat template and returns the answer."""
        return self.generate(messages, **options)

    def cancel(self, request_id: str) -> bool:
        """Ends a running request, whose stream completes with finish reason "abort". False if there is none."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        return self._find(lambda stub: stub.Cancel(request, metadata=self._metadata).found)

    def set_speculation(self, request_id: str, **options: Unpack[SpeculationOptions]) -> bool:
        """Changes how a running request speculates, from its next round on; its tokens stay the same. Keywords are
        those of `SpeculationOptions` and replace the earlier ones; without any, the deployment's settings apply.
        False if no such request runs."""
        request = inference_pb2.SetSpeculationRequest(request_id=request_id, speculation=build_speculation(options))
        return self._find(lambda stub: stub.SetSpeculation(request, metadata=self._metadata).found)

    def model_info(self) -> ModelInfo:
        request = inference_pb2.GetModelInfoRequest()
        return _model_info(self._ask(lambda stub: stub.GetModelInfo(request, metadata=self._metadata)))

    def server_info(self) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        return _server_info(self._ask(lambda stub: stub.GetServerInfo(request, metadata=self._metadata)))

    def _open(self, address: str, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> Call:
        return cast(Call, self._stubs[address].Generate(request, timeout=timeout_s, metadata=self._metadata))

    def _ask(self, question: "Callable[[inference_pb2_grpc.InferenceStub], T]") -> T:
        """The first gateway that answers."""
        untried = len(self._gateways.addresses)
        while True:
            address, untried = self._gateways.current, untried - 1
            try:
                return question(self._stubs[address])
            except grpc.RpcError as err:
                error = error_from_call(err, address)
                if not untried or not isinstance(error, UnavailableError):
                    raise error from err
                self._gateways.leave(address)

    def _find(self, question: "Callable[[inference_pb2_grpc.InferenceStub], bool]") -> bool:
        """Whether any gateway knows the request: each knows only its own. An error counts if all have failed."""
        errors = []
        for address, stub in self._stubs.items():
            try:
                if question(stub):
                    return True
            except grpc.RpcError as err:
                errors.append(error_from_call(err, address))
        if len(errors) == len(self._stubs):
            raise errors[0]
        return False

    def close(self) -> None:
        """Cancels what is running and disconnects."""
        # grpc cancels its calls and waits until they have ended. A KeyboardInterrupt that strikes while a call is being
        # started leaves one that nobody will see ending: Ctrl-C would hang here for ever.
        closing = threading.Thread(target=self._close_channels, name="close channels", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _close_channels(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio; `stream` needs no await, what comes from it does."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        token: str | None = None,
        tls: Tls | None = None,
        resume_within_s: float = _RESUME_WITHIN_S,
    ) -> None:
        self._gateways = Rotation(address)
        self._resume_within_s = resume_within_s
        self._metadata = metadata(token)
        self._channels = {each: open_async_channel(each, tls, *_CHANNEL_OPTIONS) for each in self._gateways.addresses}
        # The stubs' declarations know asynchronous methods under another name than the code does.
        self._stubs = {
            each: cast("inference_pb2_grpc.InferenceAsyncStub", inference_pb2_grpc.InferenceStub(channel))
            for each, channel in self._channels.items()
        }
        first = self._gateways.addresses[0]  # which keeps the jobs
        self.jobs = AsyncJobsClient(self._channels[first], first, self._metadata)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Starts a request and returns its chunks as they come. Keywords are those of `GenerateOptions`."""
        request = _resumable(prompt, options, self._resume_within_s, len(self._gateways.addresses))
        return AsyncStream(request, self._open, self._gateways)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a request to its end."""
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    async def chat(self, messages: Sequence[ChatMessage], **options: Unpack[GenerateOptions]) -> Completion:
        """Runs a conversation through the model's chat template and returns the answer."""
        return await self.generate(messages, **options)

    async def cancel(self, request_id: str) -> bool:
        """Ends a running request, whose stream completes with finish reason "abort". False if there is none."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        return await self._find(lambda stub: stub.Cancel(request, metadata=self._metadata))

    async def set_speculation(self, request_id: str, **options: Unpack[SpeculationOptions]) -> bool:
        """Changes how a running request speculates, from its next round on; its tokens stay the same. Keywords are
        those of `SpeculationOptions` and replace the earlier ones; without any, the deployment's settings apply.
        False if no such request runs."""
        request = inference_pb2.SetSpeculationRequest(request_id=request_id, speculation=build_speculation(options))
        return await self._find(lambda stub: stub.SetSpeculation(request, metadata=self._metadata))

    async def model_info(self) -> ModelInfo:
        request = inference_pb2.GetModelInfoRequest()
        return _model_info(await self._ask(lambda stub: stub.GetModelInfo(request, metadata=self._metadata)))

    async def server_info(self) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        return _server_info(await self._ask(lambda stub: stub.GetServerInfo(request, metadata=self._metadata)))

    def _open(self, address: str, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> AsyncCall:
        return self._stubs[address].Generate(request, timeout=timeout_s, metadata=self._metadata)

    async def _ask(self, question: "Callable[[inference_pb2_grpc.InferenceAsyncStub], Awaitable[T]]") -> T:
        """The first gateway that answers."""
        untried = len(self._gateways.addresses)
        while True:
            address, untried = self._gateways.current, untried - 1
            try:
                return await question(self._stubs[address])
            except grpc.RpcError as err:
                error = error_from_call(err, address)
                if not untried or not isinstance(error, UnavailableError):
                    raise error from err
                self._gateways.leave(address)

    async def _find(self, question: "Callable[[inference_pb2_grpc.InferenceAsyncStub], Awaitable[_Finding]]") -> bool:
        """Whether any gateway knows the request: each knows only its own. An error counts if all have failed."""
        errors = []
        for address, stub in self._stubs.items():
            try:
                if (await question(stub)).found:
                    return True
            except grpc.RpcError as err:
                errors.append(error_from_call(err, address))
        if len(errors) == len(self._stubs):
            raise errors[0]
        return False

    async def close(self) -> None:
        """Cancels what is running and disconnects."""
        for channel in self._channels.values():
            await channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _resumable(prompt: Prompt, options: GenerateOptions, resume_within_s: float, num_gateways: int) -> ResumableRequest:
    return ResumableRequest(
        build_request(prompt, options),
        timeout_s=options.get("timeout_s"),
        resume_within_s=resume_within_s,
        num_gateways=num_gateways,
        now=time.monotonic,
    )


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
