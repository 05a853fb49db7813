"""The one thread that runs rounds, in order of arrival, for all engines."""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from echelon.pb.worker_pb2 import DiskContents, EngineRole, MoveOrder, MoveResult, Round, RoundReply, RoundResult
from workers.engine.engine import Engine
from workers.engine.rounds import ProtocolError
from workers.process import round_channel
from workers.process.move_answers import MoveAnswers
from workers.process.round_channel import Frame, Kind
from workers.tiers.orders import check_order
from workers.trace import Tracer

logger = logging.getLogger(__name__)


class Session(Protocol):
    """A scheduler's stream to one engine, as the run loop sees it. Calls may come from any thread and do not block."""

    @property
    def role(self) -> EngineRole.ValueType: ...

    @property
    def is_open(self) -> bool: ...

    def deliver(self, result: RoundResult) -> None: ...

    def deliver_move(self, result: MoveResult) -> None: ...

    def deliver_disk(self, contents: DiskContents) -> None: ...

    def reject(self, error: str) -> None:
        """End the stream with INVALID_ARGUMENT; it is no longer open when this returns."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session takes over its engine."""

    session: Session


@dataclass(frozen=True, slots=True)
class Arrived:
    """A round has arrived."""

    session: Session
    round_: Round
    arrived_ns: int


@dataclass(frozen=True, slots=True)
class Ordered:
    """A move order has arrived."""

    session: Session
    order: MoveOrder


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the current round."""


Work = Opened | Arrived | Ordered | Stop


class RunLoop:
    """The leader's loop. `submit` may be called from any thread."""

    def __init__(
        self, engines: Mapping[EngineRole.ValueType, Engine], channel: round_channel.Leader, tracer: Tracer
    ) -> None:
        self._engines = engines
        self._channel = channel
        self._tracer = tracer
        self._work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._next: deque[Work] = deque()  # taken from the queue to look ahead, in order
        self._owners: dict[EngineRole.ValueType, Session] = {}
        self._answers = MoveAnswers()
        self._stopping = False

    def submit(self, work: Work) -> None:
        if isinstance(work, Stop):
            self._stopping = True  # takes effect before the queued rounds
        self._work.put(work)

    def run(self) -> None:
        """Run until Stop. Raises whatever ends the incarnation: a lost rank, a failed collective, a bug."""
        self._channel.listen(lambda rank, frame: self._answers.add(frame.ticket, rank, _reply(frame)))
        while True:
            work = self._take()
            if self._stopping:
                return
            if isinstance(work, Opened):
                self._take_over(work.session)
            elif isinstance(work, Arrived):
                self._run_round(work)
            elif isinstance(work, Ordered):
                self._begin_move(work)

    def _take(self) -> Work:
        """The next piece of work; waits for one. `_next` then holds everything that has arrived after it."""
        if not self._next:
            self._next.append(self._work.get())
        while not self._work.empty():
            self._next.append(self._work.get())
        return self._next.popleft()

    def _take_over(self, session: Session) -> None:
        role = session.role
        if role in self._owners:
            logger.info("a new stream for the %s engine: its slots are free", EngineRole.Name(role))
        self._owners[role] = session
        self._answers.forget(role)
        engine = self._engines[role]
        self._channel.send(Frame(Kind.RESET, role, b""), engine.num_ranks)
        engine.reset()
        if engine.info.num_disk_blocks:
            ticket = self._answers.expect(session, engine.num_ranks)
            self._spread(engine, Frame(Kind.LIST_DISK, role, b"", ticket))

    def _run_round(self, work: Arrived) -> None:
        session, round_ = work.session, work.round_
        if not self._is_current(session):
            return
        engine = self._engines[session.role]
        started_ns = time.monotonic_ns()
        queued = [other.round_ for other in self._next if isinstance(other, Arrived) and other.session is session]
        try:
            engine.check(round_, queued)
        except ProtocolError as err:
            logger.error("refused: %s", err)
            session.reject(str(err))
            return
        if round_.trace:
            self._tracer.start()
        if engine.num_ranks > 1:
            with self._tracer.span("transfer"):
                self._channel.send(Frame(Kind.ROUND, session.role, round_.SerializeToString()), engine.num_ranks)
        result = engine.run(round_)
        result.round_id = round_.round_id
        result.incarnation = round_.incarnation
        result.queue_ns = started_ns - work.arrived_ns
        result.run_ns = time.monotonic_ns() - started_ns
        if round_.trace:
            result.spans.extend(self._tracer.stop())
            for answer in self._channel.collect(engine.num_ranks):
                result.MergeFromString(answer)
        session.deliver(result)

    def _begin_move(self, work: Ordered) -> None:
        session, order = work.session, work.order
        if not self._is_current(session):
            return
        engine = self._engines[session.role]
        try:
            check_order(order, engine.info)
        except ProtocolError as err:
            logger.error("refused: %s", err)
            session.reject(str(err))
            return
        ticket = self._answers.expect(session, engine.num_ranks)
        self._spread(engine, Frame(Kind.MOVE, session.role, order.SerializeToString(), ticket))

    def _spread(self, engine: Engine, frame: Frame) -> None:
        """A move or a list goes to all ranks of the engine."""
        self._channel.send(frame, engine.num_ranks)
        _do(engine, frame, lambda reply: self._answers.add(frame.ticket, 0, reply))

    def _is_current(self, session: Session) -> bool:
        """Whether its stream is still open."""
        return self._owners[session.role] is session and session.is_open


def follow(engines: Mapping[EngineRole.ValueType, Engine], channel: round_channel.Follower, tracer: Tracer) -> None:
    """The loop of every other rank: does what the leader says, until it says stop. Raises as RunLoop.run does."""
    while True:
        frame = channel.receive()
        if frame.kind is Kind.STOP:
            return
        engine = engines[EngineRole.ValueType(frame.role)]
        if frame.kind is Kind.RESET:
            engine.reset()
        elif frame.kind is Kind.ROUND:
            _run_traced(engine, Round.FromString(frame.payload), channel, tracer)
        else:
            _do(engine, frame, partial(_answer, channel, frame))


def _do(engine: Engine, frame: Frame, on_done: Callable[[RoundReply], None]) -> None:
    """Begin a move or a list on this rank. `on_done` is called by a thread of the mover."""
    assert engine.mover is not None, "the leader has checked"
    if frame.kind is Kind.MOVE:
        order = MoveOrder.FromString(frame.payload)
        engine.mover.submit(order, lambda result: on_done(RoundReply(move=result)))
    else:
        engine.mover.list_disk(lambda digests: on_done(RoundReply(disk=DiskContents(digests=digests))))


def _answer(channel: round_channel.Follower, asked: Frame, reply: RoundReply) -> None:
    channel.answer_move(asked, reply.SerializeToString())


def _reply(frame: Frame) -> RoundReply:
    return RoundReply.FromString(frame.payload)


def _run_traced(engine: Engine, round_: Round, channel: round_channel.Follower, tracer: Tracer) -> None:
    if not round_.trace:
        engine.run(round_)
        return
    tracer.start()
    engine.run(round_)
    channel.answer(RoundResult(spans=tracer.stop()).SerializeToString())
