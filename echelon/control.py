"""Queries for operators: the status of replicas, and a trace of their work."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self, cast

import grpc

from echelon.channel import Tls, metadata, open_channel
from echelon.errors import UnavailableError, error_from_call
from echelon.pb import control_pb2, control_pb2_grpc, scheduler_pb2
from echelon.rotation import Rotation

_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)  # a traced round of many layers has many spans
_REPLY_TIMEOUT_S = 10.0


class ControlClient:
    """A connection to the gateway at `address`, host:port; of several, to the first that answers. Errors are those of
    `echelon.errors`."""

    def __init__(self, address: str, *, token: str | None = None, tls: Tls | None = None) -> None:
        self._gateways = Rotation(address)
        self._metadata = metadata(token)
        self._channels = {each: open_channel(each, tls, *_CHANNEL_OPTIONS) for each in self._gateways.addresses}

    def replicas(self) -> control_pb2.GetReplicasResponse:
        """How every replica fares now."""
        request = control_pb2.GetReplicasRequest()
        for _ in self._gateways.addresses:
            address = self._gateways.current
            stub = control_pb2_grpc.ControlStub(self._channels[address])
            try:
                return stub.GetReplicas(request, timeout=_REPLY_TIMEOUT_S, metadata=self._metadata)
            except grpc.RpcError as err:
                error = error_from_call(err, address)
                if not isinstance(error, UnavailableError):
                    raise error from err
                self._gateways.leave(address)
        raise error

    def trace(
        self, *, num_rounds: int = 0, duration_s: float = 0.0, replica: int = 0
    ) -> Iterator[scheduler_pb2.TraceEvent]:
        """Records from now on, until so many rounds of the target were sent or the time is over (0: no such limit);
        the events come as they happen. Closing the iterator ends the recording."""
        trace = scheduler_pb2.TraceRequest(num_rounds=num_rounds, duration_s=duration_s)
        if len(self._channels) > 1:
            self.replicas()  # finds one that answers
        address = self._gateways.current
        stub = control_pb2_grpc.ControlStub(self._channels[address])
        call = stub.Trace(control_pb2.ReplicaTraceRequest(replica=replica, trace=trace), metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as err:
            raise error_from_call(err, address) from err
        finally:
            cast("grpc.Future[object]", call).cancel()

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
