"""The moves ordered from a worker group that it has not answered yet."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from childproc.block_digests import Digest
from echelon.pb import worker_pb2
from scheduler.errors import UnexpectedAnswerError

Kind: TypeAlias = "worker_pb2.MoveOrder.Kind.ValueType"
OnAnswer = Callable[[Collection[int], float], None]  # indexes of the blocks that failed, and the time

STORE = worker_pb2.MoveOrder.STORE
LOAD = worker_pb2.MoveOrder.LOAD
WRITE = worker_pb2.MoveOrder.WRITE
READ = worker_pb2.MoveOrder.READ
DROP = worker_pb2.MoveOrder.DROP
KINDS = (STORE, LOAD, WRITE, READ, DROP)


@dataclass(slots=True, eq=False)
class Move:
    kind: Kind
    num_blocks: int
    sent_s: float
    on_answer: OnAnswer
    is_late: bool = False  # a disk that takes too long was blamed for it

    @property
    def needs_disk(self) -> bool:
        return self.kind in (WRITE, READ)


@dataclass(slots=True)
class MoveTotals:
    """Of the answered moves of one kind."""

    num_blocks: int = 0  # that succeeded
    num_failed: int = 0
    num_damaged: int = 0  # of them
    run_s: float = 0.0
    queue_s: float = 0.0  # from their order to their answer, but for the time in which they ran


class Moves:
    def __init__(self, incarnation: int) -> None:
        self.totals = {kind: MoveTotals() for kind in KINDS}
        self._incarnation = incarnation
        self._num_moves = 0
        self._in_flight: dict[int, Move] = {}

    def __iter__(self) -> Iterator[Move]:
        return iter(self._in_flight.values())

    def num_in_flight(self, kind: Kind) -> int:
        return sum(move.kind == kind for move in self)

    def num_blocks_in_flight(self, *kinds: Kind) -> int:
        return sum(move.num_blocks for move in self if move.kind in kinds)

    def order(
        self,
        kind: Kind,
        now: float,
        on_answer: OnAnswer,
        *,
        block_ids: Iterable[int] = (),
        host_slots: Iterable[int] = (),
        digests: Iterable[Digest] = (),
    ) -> worker_pb2.MoveOrder:
        """The message for a move, which is in flight from now on."""
        self._num_moves += 1
        message = worker_pb2.MoveOrder(
            move_id=self._num_moves,
            incarnation=self._incarnation,
            kind=kind,
            block_ids=block_ids,
            host_slots=host_slots,
            digests=digests,
        )
        num_blocks = max(len(message.host_slots), len(message.digests))
        self._in_flight[self._num_moves] = Move(kind, num_blocks, now, on_answer)
        return message

    def complete(self, result: worker_pb2.MoveResult, now: float) -> Move:
        """Pass the answer to the one that ordered the move. Raises UnexpectedAnswerError."""
        move = self._in_flight.pop(result.move_id, None)
        if move is None or max(result.failed, default=-1) >= move.num_blocks:
            raise UnexpectedAnswerError(f"the answer to move {result.move_id} does not fit what was ordered")
        failed = set(result.failed)
        totals = self.totals[move.kind]
        totals.num_blocks += move.num_blocks - len(failed)
        totals.num_failed += len(failed)
        totals.num_damaged += result.num_damaged
        totals.run_s += result.run_ns * 1e-9
        totals.queue_s += max(0.0, now - move.sent_s - result.run_ns * 1e-9)
        move.on_answer(failed, now)
        return move
