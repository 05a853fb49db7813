"""The round channel: the leader repeats each round to the other ranks, and all watch each other.

Plain TCP, not a collective. On two busy cores a send to one rank and its answer took 14 us, to three 45 us. A gloo
broadcast with its answer took 164 us and 555 us (p90 2 and 4 ms, because gloo's own threads have to be scheduled). A
rank that dies is noticed at once, as the end of its connection.

Each follower has three connections to the leader. `rounds` carries frames, in order, and answers to rounds that want
them. `moves` carries answers to moves, which end in any order, from threads that run no rounds. `pulse` carries a byte
each way every second, from a thread of its own, so that a rank that is gone or frozen is noticed during rounds and
between them. The leader tells the scheduler who owes an answer when it is asked for its info.
"""

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import product
from math import inf

from childproc.sockets import receive_exactly
from workers.process.cohort import Cohort
from workers.process.handshake import TOKEN_BYTES, accept_peers, introduce

_HEADER = struct.Struct("<IBBQ")  # bytes of payload, kind, role, ticket
_ROUNDS, _PULSE, _MOVES = _CHANNELS = range(3)  # the connections of a follower
_PULSE_INTERVAL_S = 1.0  # how often the leader asks each follower whether it is there; not measured
OnLost = Callable[[str], None]
OnAnswer = Callable[[int, "Frame"], None]  # rank, answer


class LostRank(ConnectionError):
    """Another rank of the group died or does not answer. Says which."""


class Kind(IntEnum):
    """What a frame tells a follower to do."""

    ROUND = 1  # run it; the payload is a Round
    RESET = 2  # free all slots of an engine and end its moves
    STOP = 3  # end, with success
    ANSWER = 4  # nothing: the follower sends it, after a round that asks for one, a move or a list
    MOVE = 5  # begin it; the payload is a MoveOrder, the answer a RoundReply
    LIST_DISK = 6  # tell what the disk of an engine holds, in a RoundReply


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    role: int
    payload: bytes
    ticket: int = 0  # of a move or a list: the answer has the same


class Leader:
    """Rank 0's end. Only one thread may call `send`. Without followers it does nothing."""

    def __init__(
        self,
        rounds: Sequence[socket.socket],
        pulses: Sequence[socket.socket],
        moves: Sequence[socket.socket],
        timeout_s: float,
    ) -> None:
        """Connections by rank, starting with rank 1."""
        self._rounds = rounds
        self._pulses = pulses
        self._moves = moves
        self._timeout_s = timeout_s
        self._asked_s = [inf] * len(pulses)  # when each was asked, if it has not answered since
        self._stopping = threading.Event()

    @classmethod
    def accept(cls, cohort: Cohort, host: str, timeout_s: float) -> "Leader":
        """Wait until every other rank has connected. Raises TimeoutError if one does not."""
        if cohort.world_size == 1:
            return cls([], [], [], timeout_s)
        token = secrets.token_bytes(TOKEN_BYTES)
        peers = list(product(range(1, cohort.world_size), _CHANNELS))
        with socket.create_server((host, 0), backlog=128) as listener:
            cohort.publish("control", f"{host} {listener.getsockname()[1]} {token.hex()}")
            connections = accept_peers(listener, token, peers, cohort.start_timeout_s)
        rounds, pulses, moves = (
            [connections[rank, channel] for rank in range(1, cohort.world_size)]
            for channel in (_ROUNDS, _PULSE, _MOVES)
        )
        return cls(rounds, pulses, moves, timeout_s)

    def send(self, frame: Frame, num_ranks: int) -> None:
        """Send to the ranks below `num_ranks`. Raises LostRank."""
        data = _pack(frame)
        for rank, connection in enumerate(self._rounds[: num_ranks - 1], start=1):
            try:
                connection.sendall(data)
            except OSError as err:
                raise LostRank(f"lost rank {rank}: {err}") from err

    def collect(self, num_ranks: int) -> list[bytes]:
        """The answers of the other ranks below `num_ranks`; blocks until they come. Raises LostRank."""
        answers = []
        for rank, connection in enumerate(self._rounds[: num_ranks - 1], start=1):
            try:
                answers.append(_receive(connection).payload)
            except OSError as err:
                raise LostRank(f"lost rank {rank}: {err}") from err
        return answers

    def listen(self, on_answer: OnAnswer) -> None:
        """Call `on_answer`, from threads, with each answer to a move or list. The end of a rank is `watch`'s to see."""
        for rank, connection in enumerate(self._moves, start=1):
            thread = threading.Thread(
                target=_pass_on, args=(rank, connection, on_answer), name=f"moves of rank {rank}", daemon=True
            )
            thread.start()

    def watch(self, on_lost: OnLost) -> None:
        """Call `on_lost` from a thread when a follower dies or does not answer for `timeout_s`."""
        for rank, pulse in enumerate(self._pulses, start=1):
            thread = threading.Thread(
                target=self._beat, args=(rank, pulse, on_lost), name=f"pulse of rank {rank}", daemon=True
            )
            thread.start()

    def silence(self) -> tuple[int, float]:
        """The rank that has owed an answer for longest, and for how many seconds; zeros if all have answered. Callable
        from any thread."""
        asked_s, rank = min(((asked_s, rank) for rank, asked_s in enumerate(self._asked_s, 1)), default=(inf, 0))
        return (0, 0.0) if asked_s == inf else (rank, time.monotonic() - asked_s)

    def stop(self) -> None:
        """Tell the followers to end; those already gone no longer matter."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self.send(Frame(Kind.STOP, 0, b""), len(self._rounds) + 1)

    def _beat(self, rank: int, pulse: socket.socket, on_lost: OnLost) -> None:
        pulse.settimeout(self._timeout_s)
        try:
            while self._is_answered(rank, pulse):
                if self._stopping.wait(_PULSE_INTERVAL_S):
                    return
            reason = "it died"
        except TimeoutError:
            reason = f"it did not answer for {self._timeout_s:g} s"
        except OSError as err:
            reason = f"it died ({err})"
        if not self._stopping.is_set():
            on_lost(f"lost rank {rank}: {reason}")

    def _is_answered(self, rank: int, pulse: socket.socket) -> bool:
        self._asked_s[rank - 1] = time.monotonic()
        pulse.sendall(b"?")
        answer = pulse.recv(1)
        self._asked_s[rank - 1] = inf
        return bool(answer)


class Follower:
    """The end of another rank. Only one thread may call `receive`."""

    def __init__(self, rounds: socket.socket, pulse: socket.socket, moves: socket.socket, timeout_s: float) -> None:
        self._rounds = rounds
        self._pulse = pulse
        self._moves = moves
        self._moves_lock = threading.Lock()
        self._timeout_s = timeout_s
        self._stopping = threading.Event()

    @classmethod
    def connect(cls, cohort: Cohort, timeout_s: float) -> "Follower":
        host, port, token = cohort.read("control").split()
        rounds, pulse, moves = (
            _connect((host, int(port)), bytes.fromhex(token), cohort.rank, channel)
            for channel in (_ROUNDS, _PULSE, _MOVES)
        )
        return cls(rounds, pulse, moves, timeout_s)

    def receive(self) -> Frame:
        """The next frame; blocks as long as the leader lives. Raises LostRank if it dies."""
        try:
            frame = _receive(self._rounds)
        except OSError as err:
            raise LostRank(f"lost rank 0, the leader: it died ({err})") from err
        if frame.kind is Kind.STOP:
            self._stopping.set()
        return frame

    def answer(self, payload: bytes) -> None:
        """Answer the round received last. Raises LostRank."""
        try:
            self._rounds.sendall(_pack(Frame(Kind.ANSWER, 0, payload)))
        except OSError as err:
            raise LostRank(f"lost rank 0, the leader: it died ({err})") from err

    def answer_move(self, asked: Frame, payload: bytes) -> None:
        """Answer a move or a list. From any thread. The end of the leader is `watch`'s to see."""
        with self._moves_lock, contextlib.suppress(OSError):
            self._moves.sendall(_pack(Frame(Kind.ANSWER, asked.role, payload, asked.ticket)))

    def watch(self, on_lost: OnLost) -> None:
        """Call `on_lost` from a thread when the leader dies or does not ask for `timeout_s`."""
        threading.Thread(target=self._answer, args=(on_lost,), name="pulse", daemon=True).start()

    def _answer(self, on_lost: OnLost) -> None:
        self._pulse.settimeout(self._timeout_s)
        try:
            while self._pulse.recv(1):
                self._pulse.sendall(b"!")
            reason = "it died"
        except TimeoutError:
            reason = f"it was not heard of for {self._timeout_s:g} s"
        except OSError as err:
            reason = f"it died ({err})"
        if not self._stopping.is_set():
            on_lost(f"lost rank 0, the leader: {reason}")


def _connect(address: tuple[str, int], token: bytes, rank: int, channel: int) -> socket.socket:
    connection = socket.create_connection(address, timeout=_PULSE_INTERVAL_S * 10)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    introduce(connection, token, (rank, channel))
    return connection


def _pass_on(rank: int, connection: socket.socket, on_answer: OnAnswer) -> None:
    with contextlib.suppress(OSError):
        while True:
            on_answer(rank, _receive(connection))


def _pack(frame: Frame) -> bytes:
    return _HEADER.pack(len(frame.payload), frame.kind, frame.role, frame.ticket) + frame.payload


def _receive(connection: socket.socket) -> Frame:
    num_bytes, kind, role, ticket = _HEADER.unpack(receive_exactly(connection, _HEADER.size))
    return Frame(Kind(kind), role, bytes(receive_exactly(connection, num_bytes)), ticket)
