"""Whether a process can listen on a port. The parent asks before the start, the child after it has failed to."""

import socket


def try_bind(host: str, port: int) -> None:
    """Raises the OSError of the operating system if nobody can listen there now."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        probe.bind(address)
