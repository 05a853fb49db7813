"""Only ranks that know the token join a group's round channel, whoever else connects."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from workers.process.handshake import TOKEN_BYTES, Peer, accept_peers, introduce

TOKEN = bytes(range(TOKEN_BYTES))
PEERS: list[Peer] = [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        yield listener


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def knock(listener: socket.socket, stack: contextlib.ExitStack, said: bytes = b"") -> socket.socket:
    connection = stack.enter_context(socket.create_connection(listener.getsockname(), timeout=30))
    connection.sendall(said)
    return connection


def join(listener: socket.socket, stack: contextlib.ExitStack, peer: Peer) -> socket.socket:
    connection = knock(listener, stack)
    introduce(connection, TOKEN, peer)
    return connection


def accepted(listener: socket.socket, stack: contextlib.ExitStack) -> dict[Peer, socket.socket]:
    peers = accept_peers(listener, TOKEN, PEERS, 30.0)
    for connection in peers.values():
        stack.enter_context(connection)
    return peers


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it sent more than was read
        return True


def test_strangers_neither_join_nor_delay_the_ranks(listener: socket.socket, stack: contextlib.ExitStack) -> None:
    strangers = [
        *(knock(listener, stack) for _ in range(100)),
        knock(listener, stack, TOKEN[:-1]),
        knock(listener, stack, b"GET / HTTP/1.1\r\n\r\n" * 100),
        knock(listener, stack, bytes(TOKEN_BYTES) + b"\x01\x00\x00"),
        knock(listener, stack, TOKEN + b"\x09\x00\x00"),  # not a rank of this group
    ]
    with socket.create_connection(listener.getsockname()):
        pass  # gone before anyone reads from it
    ranks = {peer: join(listener, stack, peer) for peer in reversed(PEERS)}
    peers = accepted(listener, stack)
    assert set(peers) == set(PEERS)
    for peer, connection in ranks.items():
        peers[peer].sendall(bytes([*peer]))
        assert connection.recv(2) == bytes([*peer])
    assert all(is_closed(stranger) for stranger in strangers)


def test_a_rank_can_connect_only_once(listener: socket.socket, stack: contextlib.ExitStack) -> None:
    first, second = join(listener, stack, (1, 0)), join(listener, stack, (1, 0))
    for peer in PEERS[1:]:
        join(listener, stack, peer)
    peers = accepted(listener, stack)
    peers[1, 0].sendall(b"x")
    assert first.recv(1) == b"x"
    assert is_closed(second)


def test_a_missing_rank_is_named(listener: socket.socket) -> None:
    with pytest.raises(TimeoutError, match=r"rank 2 did not connect within 0\.01 s"):
        accept_peers(listener, TOKEN, [(2, 0)], 0.01)
