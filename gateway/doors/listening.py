"""Addresses to listen on, and error messages for when that fails."""

import errno
import socket


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Listens at the first address of `host`. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
    except OSError:
        server.close()
        raise
    return server


def bind_problem(host: str, port: int, err: OSError, *, key: str) -> str:
    """For a person: why nobody can listen there, and which key of the deployment file to change."""
    address = join(host, port)
    if err.errno == errno.EADDRINUSE:
        return f"{address} is taken: stop the process that listens there, or change {key}"
    return f"cannot listen on {address} ({err.strerror or err}); change server.host or {key}"
