"""Ports: whether a process can listen on one, which the parent asks before the start and the child after it has failed
to, and where others reach it."""

import socket

_EVERYWHERE = ("0.0.0.0", "::", "[::]")


def try_bind(host: str, port: int) -> None:
    """Raises the OSError of the operating system if nobody can listen there now."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        probe.bind(address)


def reachable_host(host: str, node: str) -> str:
    """Where clients find a server that listens on `host` of a node with this address: at no wildcard."""
    return node if node and host in _EVERYWHERE else host
