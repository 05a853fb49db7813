"""A server of inference.proto that does what the test says, for tests of the client and the CLI."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from echelon.pb import control_pb2, control_pb2_grpc, inference_pb2_grpc, scheduler_pb2
from echelon.pb import inference_pb2 as pb

Script = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]


def chunk(text: str, token_ids: list[int], **fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(request_id="r", chunk=pb.GenerateChunk(text=text, token_ids=token_ids, **fields))


def complete(num_tokens: int, **finished: Any) -> pb.GenerateResponse:
    """The end of a request that accepted half of its drafts, got two tokens per round and took one second."""
    message = pb.GenerateComplete(
        finished=[pb.Finished(**{"reason": pb.FINISH_REASON_LENGTH, "num_tokens": num_tokens, **finished})],
        usage=pb.Usage(
            prompt_tokens=44,
            completion_tokens=num_tokens,
            cached_prompt_tokens=40,
            cached_prompt_tokens_from_host=36,
            cached_prompt_tokens_from_disk=3,
        ),
        speculation=pb.SpeculationStats(
            num_rounds=num_tokens // 2,
            num_drafts=num_tokens // 2,
            num_draft_tokens=num_tokens,
            num_accepted_tokens=num_tokens // 2,
            accepted_per_position=[num_tokens // 2],
        ),
        seed=99,
        timings=pb.RequestTimings(queue_s=0.001, first_token_s=0.01, total_s=1.0),
    )
    return pb.GenerateResponse(request_id="r", complete=message)


def say_hello(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield chunk("Hel", [1, 2])
    yield chunk("lo", [3, 4], offset=2)
    yield complete(4)


def refuse(code: grpc.StatusCode, message: str) -> Script:
    def script(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        context.abort(code, message)
        yield pb.GenerateResponse()

    return script


@dataclass
class FakeGateway(inference_pb2_grpc.InferenceServicer):
    script: Script = say_hello
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    time_remaining_s: list[float] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    adjusted: list[pb.SetSpeculationRequest] = field(default_factory=list)
    dropped: threading.Event = field(default_factory=threading.Event)  # a client left before its stream ended
    has_chat_template: bool = True
    address: str = ""
    control: "FakeControl" = field(default_factory=lambda: FakeControl())

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.time_remaining_s.append(context.time_remaining())
        yield from self.script(request, context)

    def hang_after_one_chunk(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        context.add_callback(self.dropped.set)
        yield chunk("a", [1])
        self.dropped.wait()

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        self.cancelled.append(request.request_id)
        return pb.CancelResponse(found=request.request_id == "r")

    def SetSpeculation(
        self, request: pb.SetSpeculationRequest, context: grpc.ServicerContext
    ) -> pb.SetSpeculationResponse:
        self.adjusted.append(request)
        return pb.SetSpeculationResponse(found=request.request_id == "r")

    def GetModelInfo(self, request: Any, context: grpc.ServicerContext) -> pb.ModelInfo:
        return pb.ModelInfo(
            model="demo", max_model_len=64, vocab_size=9, eos_token_ids=[0], has_chat_template=self.has_chat_template
        )

    def GetServerInfo(self, request: Any, context: grpc.ServicerContext) -> pb.ServerInfo:
        return pb.ServerInfo(version="1", uptime_s=2.0, num_replicas=1, num_ready_replicas=1)


@dataclass
class FakeControl(control_pb2_grpc.ControlServicer):
    """Returns the `statuses` one after the other, then the last one again and again."""

    statuses: list[control_pb2.GetReplicasResponse] = field(default_factory=list)
    events: list[scheduler_pb2.TraceEvent] = field(default_factory=list)
    traces: list[control_pb2.ReplicaTraceRequest] = field(default_factory=list)
    lost: bool = False  # the connection breaks after the last event

    def GetReplicas(self, request: Any, context: grpc.ServicerContext) -> control_pb2.GetReplicasResponse:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def Trace(
        self, request: control_pb2.ReplicaTraceRequest, context: grpc.ServicerContext
    ) -> Iterator[scheduler_pb2.TraceEvent]:
        self.traces.append(request)
        yield from self.events
        if self.lost:
            context.abort(grpc.StatusCode.UNAVAILABLE, "lost")


@contextmanager
def serving(gateway: FakeGateway) -> Iterator[FakeGateway]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(gateway, server)
    control_pb2_grpc.add_ControlServicer_to_server(gateway.control, server)
    gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield gateway
    finally:
        server.stop(grace=0)
