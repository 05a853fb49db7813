"""Queries for operators: the status of replicas, and a trace of their work."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self, cast

import grpc

from echelon.channel import channel_options
from echelon.errors import error_from_status
from echelon.pb import control_pb2, control_pb2_grpc, scheduler_pb2

_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)  # a traced round of many layers has many spans
_REPLY_TIMEOUT_S = 10.0


class ControlClient:
    """A connection to the gateway at `address`, host:port. Errors are those of `echelon.errors`."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=channel_options(address, *_CHANNEL_OPTIONS))
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def replicas(self) -> control_pb2.GetReplicasResponse:
        """How every replica fares now."""
        try:
            return self._stub.GetReplicas(control_pb2.GetReplicasRequest(), timeout=_REPLY_TIMEOUT_S)
        except grpc.RpcError as err:
            raise _error(err) from err

    def trace(
        self, *, num_rounds: int = 0, duration_s: float = 0.0, replica: int = 0
    ) -> Iterator[scheduler_pb2.TraceEvent]:
        """Records from now on, until so many rounds of the target were sent or the time is over (0: no such limit);
        the events come as they happen. Closing the iterator ends the recording."""
        trace = scheduler_pb2.TraceRequest(num_rounds=num_rounds, duration_s=duration_s)
        call = self._stub.Trace(control_pb2.ReplicaTraceRequest(replica=replica, trace=trace))
        try:
            yield from call
        except grpc.RpcError as err:
            raise _error(err) from err
        finally:
            cast("grpc.Future[object]", call).cancel()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _error(err: grpc.RpcError) -> Exception:
    call = cast(grpc.Call, err)
    return error_from_status(call.code(), call.details())
