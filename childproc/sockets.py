"""Reads from sockets between our processes."""

import socket


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytearray:
    """Blocks until so many bytes are there. Raises ConnectionError if the other end closes before."""
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            raise ConnectionError("end of the connection")
        view = view[received:]
    return data
