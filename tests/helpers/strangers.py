"""Somebody who can reach a port and has no certificate: what does he get?"""

import contextlib
import socket
import ssl

import grpc

from childproc.wires import open_blocking_channel

_METHODS = (
    "/echelon.v1.Scheduler/GetSchedulerStatus",
    "/echelon.v1.Worker/GetWorkerInfo",
    "/grpc.health.v1.Health/Check",
)
_CALL_S = 5.0
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"  # the preface, and empty settings


def answers_plainly(address: tuple[str, int]) -> bool:
    """Whether any method answers a call that is not encrypted."""
    with open_blocking_channel(f"{address[0]}:{address[1]}") as channel:
        for method in _METHODS:
            with contextlib.suppress(grpc.RpcError):
                channel.unary_unary(method)(b"", timeout=_CALL_S)
                return True
    return False


def answers_without_certificate(address: tuple[str, int]) -> bool:
    """Whether a server that speaks TLS goes on with a client that shows no certificate: it would send its settings."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError):
        plain = socket.create_connection(address, timeout=_CALL_S)
        with plain, context.wrap_socket(plain) as encrypted:
            encrypted.sendall(_HTTP2)
            return bool(encrypted.recv(1))
    return False
