"""Many odd messages to a port inside a deployment, from somebody who has a certificate of it and from others."""

import contextlib
import random
import socket
import ssl
import struct
import tempfile
from collections import Counter
from pathlib import Path

import grpc

from cluster.authority import Authority
from echelon import __version__
from echelon.pb import worker_pb2, worker_pb2_grpc
from echelon.pb.process_pb2 import ProcessIdentity
from echelon.pb.scheduler_pb2 import SchedulerRequest, TraceRequest
from echelon.pb.worker_pb2 import RoundRequest
from tests.helpers.scrambled import scramble

PATHS = {
    "/echelon.v1.Scheduler/Connect": SchedulerRequest,
    "/echelon.v1.Scheduler/GetSchedulerStatus": SchedulerRequest,
    "/echelon.v1.Scheduler/Trace": TraceRequest,
    "/echelon.v1.Worker/Rounds": RoundRequest,
    "/echelon.v1.Worker/GetWorkerInfo": RoundRequest,
}
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"  # the preface, and empty settings
_END_HEADERS, _END_STREAM = 0x4, 0x1
_CALL_S = 0.5  # some calls end only with their client
_CONNECT_S = 30.0
_MOST_MESSAGES = 16  # of one stream
_INFO_S = 10.0
_SERVED = 0.95  # share of calls of a method that is there


def odd_message(rng: random.Random, path: str) -> bytes:
    """Well-formed without sense, damaged, cut, or no message at all."""
    message = PATHS[path]()
    scramble(rng, message, rng.choice([0.02, 0.1, 0.5, 0.9]))
    data = bytearray(message.SerializeToString())
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.choice([0, 1, 10, 300, 3000]))
        case 1:
            return bytes(data[: rng.randrange(len(data) + 1)])
        case 2 if data:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def send_with_certificate(
    channel: grpc.Channel, number: int, rng: random.Random, *, call_s: float = _CALL_S
) -> Counter[str]:
    """So many messages in calls of all methods; how the calls ended.

    Streams of rounds often begin with a hello that the worker takes, so that it looks at what follows.
    """
    ends: Counter[str] = Counter()
    hellos = _hellos(channel)
    served = [path for path in PATHS if ("Worker" in path) == bool(hellos)]
    while number > 0:
        path = rng.choice(served if rng.random() < _SERVED else list(PATHS))
        messages = [odd_message(rng, path) for _ in range(min(number, rng.randint(1, _MOST_MESSAGES)))]
        number -= len(messages)
        if hellos and path.endswith("/Rounds") and rng.random() < 0.5:
            messages.insert(0, rng.choice(hellos))
        call = channel.stream_stream(path)(iter(messages), timeout=call_s)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        ends[call.code().name] += 1
    return ends


def _hellos(channel: grpc.Channel) -> list[bytes]:
    """That a worker at this port would take; none if it is no worker's."""
    stub = worker_pb2_grpc.WorkerStub(channel)
    try:
        info = stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=_INFO_S)
    except grpc.RpcError:
        return []
    hellos = [
        worker_pb2.Hello(version=__version__, incarnation=info.incarnation, role=engine.role) for engine in info.engines
    ]
    return [RoundRequest(hello=hello).SerializeToString() for hello in hellos]


class Strangers:
    """Whoever has no certificate of a deployment: he speaks plainly, or TLS with none or with that of another CA."""

    def __init__(self) -> None:
        self._contexts = (None, _tls(None), _tls(Authority.create("other").issue("gateway-0")))

    def send(self, address: tuple[str, int], number: int, rng: random.Random) -> int:
        """So many messages in HTTP/2; how many bytes of an answer came through TLS."""
        num_answered = 0
        while number > 0:
            calls = [odd_call(rng, stream_id) for stream_id in range(1, 2 * min(number, _MOST_MESSAGES), 2)]
            number -= len(calls)
            num_answered += _exchange(address, rng.choice(self._contexts), HTTP2 + b"".join(calls))
        return num_answered


def odd_call(rng: random.Random, stream_id: int) -> bytes:
    """The frames of a call that has one message."""
    path = rng.choice(list(PATHS))
    fields = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"inside"))
    grpc_fields = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
    block = b"".join(_literal(name, value) for name, value in (*fields, *grpc_fields))
    message = odd_message(rng, path)
    data = b"\0" + struct.pack(">I", len(message)) + message
    return _frame(1, _END_HEADERS, stream_id, block) + _frame(0, _END_STREAM, stream_id, data)


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field that enters no table, in HPACK (RFC 7541, 6.2.2); both shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + payload


def _exchange(address: tuple[str, int], context: ssl.SSLContext | None, data: bytes) -> int:
    """Sends bytes, plainly or through TLS; how many came back through TLS before the first pause."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=_CONNECT_S) as plain:
        if context is None:
            plain.sendall(data)
            plain.recv(1)  # an alert of TLS, or the end
            return 0
        with context.wrap_socket(plain) as encrypted:
            encrypted.sendall(data)
            return len(encrypted.recv(4096))
    return 0


def _tls(identity: ProcessIdentity | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if identity is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pair.pem"
            path.write_bytes(identity.key + identity.certificate)
            context.load_cert_chain(path)
    return context
