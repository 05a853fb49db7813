"""Handshakes on connections to a leader: a rank says who it is, with a token that only ranks of the group know.

Anybody can connect to the port and send nothing or something else. So the leader listens to all connections at once,
and a stranger delays no rank.
"""

import contextlib
import logging
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Collection

logger = logging.getLogger(__name__)

TOKEN_BYTES = 16
_WHO = struct.Struct("<HB")  # rank, channel
_MAX_UNKNOWN = 64  # connections that have not identified themselves yet; the oldest is closed when there are more

Peer = tuple[int, int]  # rank and channel


def introduce(connection: socket.socket, token: bytes, peer: Peer) -> None:
    """The first thing that a rank sends."""
    connection.sendall(token + _WHO.pack(*peer))


def accept_peers(
    listener: socket.socket, token: bytes, expected: Collection[Peer], timeout_s: float
) -> dict[Peer, socket.socket]:
    """Wait until each of these has connected and identified itself; their connections block. All others are closed.

    Raises TimeoutError naming a missing rank after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    with (
        selectors.DefaultSelector() as selector,
        contextlib.closing(_Handshakes(token, expected, selector)) as handshakes,
    ):
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        while missing := handshakes.missing:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                raise TimeoutError(f"rank {min(missing)[0]} did not connect within {timeout_s:g} s")
            for key, _ in ready:
                if key.fileobj is listener:
                    handshakes.admit(listener)
                else:
                    handshakes.hear(key.fileobj)  # type: ignore[arg-type]  # all others are connections
    return handshakes.peers


class _Handshakes:
    """Reads handshakes from many connections as they arrive."""

    def __init__(self, token: bytes, expected: Collection[Peer], selector: selectors.BaseSelector) -> None:
        self.peers: dict[Peer, socket.socket] = {}
        self.unknown: dict[socket.socket, bytes] = {}  # bytes that each has sent so far; oldest first
        self._token = token
        self._expected = expected
        self._selector = selector

    @property
    def missing(self) -> set[Peer]:
        return set(self._expected) - self.peers.keys()

    def admit(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # it has already disconnected
            return
        connection.setblocking(False)
        self.unknown[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self.unknown) > _MAX_UNKNOWN:
            self._turn_away(next(iter(self.unknown)))

    def hear(self, connection: socket.socket) -> None:
        if connection not in self.unknown:
            return  # closed a moment ago
        size = TOKEN_BYTES + _WHO.size
        try:
            said = connection.recv(size - len(self.unknown[connection]))
        except OSError:
            said = b""
        self.unknown[connection] += said
        if not said:
            self._turn_away(connection)
        elif len(self.unknown[connection]) == size:
            self._recognise(connection, self.unknown[connection])

    def close(self) -> None:
        """Close all connections that have not identified themselves by now: they are not peers."""
        for connection in self.unknown:
            connection.close()

    def _recognise(self, connection: socket.socket, handshake: bytes) -> None:
        peer: Peer = _WHO.unpack(handshake[TOKEN_BYTES:])
        if not secrets.compare_digest(handshake[:TOKEN_BYTES], self._token) or peer not in self.missing:
            self._turn_away(connection)
            return
        del self.unknown[connection]
        self._selector.unregister(connection)
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[peer] = connection

    def _turn_away(self, connection: socket.socket) -> None:
        logger.warning("round channel: closed a stray connection")
        del self.unknown[connection]
        self._selector.unregister(connection)
        connection.close()
