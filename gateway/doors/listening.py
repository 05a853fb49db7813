"""Addresses to listen on, and what to say where that fails."""

import errno
import socket


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_problem(host: str, port: int, err: OSError, *, key: str) -> str:
    """For a person: why nobody can listen there, and which key of the deployment file to change."""
    address = join(host, port)
    if err.errno == errno.EADDRINUSE:
        return f"{address} is taken: stop the process that listens there, or change {key}"
    return f"cannot listen on {address} ({err.strerror or err}); change server.host or {key}"


def try_bind(host: str, port: int) -> None:
    """Raises the OSError of the operating system if nobody can listen there now."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        probe.bind(address)
