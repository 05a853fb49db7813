"""The one thread that runs rounds, in order of arrival, for all engines."""

import logging
import queue
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from echelon.pb.worker_pb2 import EngineRole, Round, RoundResult
from workers.engine.engine import Engine
from workers.engine.rounds import ProtocolError
from workers.process import round_channel
from workers.process.round_channel import Frame, Kind
from workers.trace import Tracer

logger = logging.getLogger(__name__)


class Session(Protocol):
    """A scheduler's stream to one engine, as the run loop sees it. Calls may come from any thread and do not block."""

    @property
    def role(self) -> EngineRole.ValueType: ...

    @property
    def is_open(self) -> bool: ...

    def deliver(self, result: RoundResult) -> None: ...

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
class Stop:
    """End after the current round."""


Work = Opened | Arrived | Stop


class RunLoop:
    """The leader's loop. `submit` may be called from any thread, and from a signal handler."""

    def __init__(
        self, engines: Mapping[EngineRole.ValueType, Engine], channel: round_channel.Leader, tracer: Tracer
    ) -> None:
        self._engines = engines
        self._channel = channel
        self._tracer = tracer
        self._work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._next: deque[Work] = deque()  # taken from the queue to look ahead, in order
        self._owners: dict[EngineRole.ValueType, Session] = {}
        self._stopping = False

    def submit(self, work: Work) -> None:
        if isinstance(work, Stop):
            self._stopping = True  # takes effect before the queued rounds
        self._work.put(work)

    def run(self) -> None:
        """Run until Stop. Raises whatever ends the incarnation: a lost rank, a failed collective, a bug."""
        while True:
            work = self._take()
            if self._stopping:
                return
            if isinstance(work, Opened):
                self._take_over(work.session)
            elif isinstance(work, Arrived):
                self._run_round(work)

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
        engine = self._engines[role]
        self._channel.send(Frame(Kind.RESET, role, b""), engine.num_ranks)
        engine.reset()

    def _run_round(self, work: Arrived) -> None:
        session, round_ = work.session, work.round_
        if self._owners[session.role] is not session or not session.is_open:
            return  # its stream has ended
        engine = self._engines[session.role]
        started_ns = time.monotonic_ns()
        behind = [other.round_ for other in self._next if isinstance(other, Arrived) and other.session is session]
        try:
            engine.check(round_, behind)
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


def follow(engines: Mapping[EngineRole.ValueType, Engine], channel: round_channel.Follower, tracer: Tracer) -> None:
    """The loop of every other rank: does what the leader says, until it says stop. Raises as RunLoop.run does."""
    while True:
        frame = channel.receive()
        if frame.kind is Kind.STOP:
            return
        engine = engines[EngineRole.ValueType(frame.role)]
        if frame.kind is Kind.RESET:
            engine.reset()
        else:
            _run_traced(engine, Round.FromString(frame.payload), channel, tracer)


def _run_traced(engine: Engine, round_: Round, channel: round_channel.Follower, tracer: Tracer) -> None:
    if not round_.trace:
        engine.run(round_)
        return
    tracer.start()
    engine.run(round_)
    channel.answer(RoundResult(spans=tracer.stop()).SerializeToString())
