"""What an attacker, a port scanner or another version of Echelon might send to a port."""

import contextlib
import random
import socket
import struct

import grpc

from echelon.pb.scheduler_pb2 import SchedulerRequest, TraceRequest
from echelon.pb.worker_pb2 import RoundRequest
from tests.helpers.scrambled import scramble

_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
_METHODS = {
    "/echelon.v1.Scheduler/Connect": SchedulerRequest,
    "/echelon.v1.Scheduler/GetSchedulerStatus": None,
    "/echelon.v1.Scheduler/Trace": TraceRequest,
    "/echelon.v1.Worker/Rounds": RoundRequest,
    "/echelon.v1.Worker/GetWorkerInfo": None,
    "/grpc.health.v1.Health/Watch": None,
    "/no.such.Service/Method": None,
}
_CALL_S = 0.3  # some calls never end, and may do so
_CONNECT_S = 30.0


def knock(address: tuple[str, int], rng: random.Random) -> socket.socket:
    """Opens a connection that sends something wrong, or nothing."""
    connection = socket.create_connection(address, timeout=_CONNECT_S)
    with contextlib.suppress(OSError):  # closed while it sent
        connection.sendall(_noise(rng))
    return connection


def garbled_call(channel: grpc.Channel, rng: random.Random) -> grpc.StatusCode:
    """Makes a call whose messages cannot be parsed, or can be parsed but make no sense. Returns how it ended."""
    method, kind = rng.choice(list(_METHODS.items()))
    messages = []
    for _ in range(rng.randint(0, 3)):
        if kind is None or rng.random() < 0.5:
            messages.append(rng.randbytes(rng.choice([0, 1, 5, 50, 5000])))
        else:
            message = kind()
            scramble(rng, message, rng.choice([0.1, 0.5, 0.9]))
            messages.append(message.SerializeToString())
    call = channel.stream_stream(method)(iter(messages), timeout=_CALL_S)
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    code: grpc.StatusCode = call.code()
    return code


def _noise(rng: random.Random) -> bytes:
    match rng.randrange(7):
        case 0:
            return rng.randbytes(rng.choice([1, 16, 19, 1000, 100_000]))
        case 1:
            return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        case 2:
            return _HTTP2 + rng.randbytes(2000)
        case 3:
            return _HTTP2 + _SETTINGS + b"".join(_frame(rng) for _ in range(rng.randint(1, 20)))
        case 4:
            return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200)  # TLS
        case 5:
            return bytes(rng.choice([0, 255]) for _ in range(rng.choice([4, 8, 64, 4096])))
        case _:
            return b""


def _frame(rng: random.Random) -> bytes:
    """A frame of HTTP/2 of any type, for any stream."""
    num_bytes = rng.choice([0, 4, 8, 100, 16384])
    head = struct.pack(">I", num_bytes)[1:] + bytes([rng.randrange(12), rng.randrange(256)])
    return head + struct.pack(">I", rng.choice([0, 1, 3, 2**31 - 1])) + rng.randbytes(num_bytes)
