"""Messages between a gateway and the processes that read requests for it: a length, then so many bytes."""

import asyncio
import socket
import struct

from childproc.sockets import receive_exactly

LOADED = b""  # the first message of such a process
_LENGTH = struct.Struct("<I")


class LinkLostError(Exception):
    """The other end has gone."""


def send(link: socket.socket, data: bytes) -> None:
    link.sendall(_LENGTH.pack(len(data)))
    link.sendall(data)


def receive(link: socket.socket) -> bytes:
    """Blocks until a whole message is there. Raises LinkLostError."""
    try:
        (length,) = _LENGTH.unpack(receive_exactly(link, _LENGTH.size))
        return bytes(receive_exactly(link, length))
    except ConnectionError as err:
        raise LinkLostError from err


async def send_async(link: socket.socket, data: bytes) -> None:
    """For a socket that does not block; the same for the next one."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(link, _LENGTH.pack(len(data)))
        await loop.sock_sendall(link, data)
    except OSError as err:
        raise LinkLostError from err


async def receive_async(link: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(await _read_async(link, _LENGTH.size))
    return bytes(await _read_async(link, length))


async def _read_async(link: socket.socket, length: int) -> bytearray:
    loop = asyncio.get_running_loop()
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        try:
            count = await loop.sock_recv_into(link, view)
        except OSError as err:
            raise LinkLostError from err
        if not count:
            raise LinkLostError
        view = view[count:]
    return buffer
