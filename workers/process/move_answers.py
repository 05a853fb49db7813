"""What the ranks of a group answer to moves, put together for the scheduler."""

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from echelon.pb.worker_pb2 import DiskContents, EngineRole, MoveResult, RoundReply

_DIGESTS_A_MESSAGE = 50_000  # 0.9 MB


class Recipient(Protocol):
    """Who gets the answers: a scheduler's stream to one engine. Calls may come from any thread and do not block."""

    @property
    def role(self) -> EngineRole.ValueType: ...

    def deliver_move(self, result: MoveResult) -> None: ...

    def deliver_disk(self, contents: DiskContents) -> None: ...


@dataclass(frozen=True, slots=True)
class _Asked:
    recipient: Recipient
    num_ranks: int
    replies: dict[int, RoundReply] = field(default_factory=dict)  # by rank


class MoveAnswers:
    """Thread-safe. Answers to what was asked for a scheduler that has gone are dropped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    def expect(self, recipient: Recipient, num_ranks: int) -> int:
        """A ticket for something that `num_ranks` ranks will answer."""
        with self._lock:
            ticket = next(self._tickets)
            self._asked[ticket] = _Asked(recipient, num_ranks)
            return ticket

    def add(self, ticket: int, rank: int, reply: RoundReply) -> None:
        """A rank has answered; the last one's answer goes to the recipient with all the others."""
        with self._lock:
            asked = self._asked.get(ticket)
            if asked is None:
                return
            asked.replies[rank] = reply
            if len(asked.replies) < asked.num_ranks:
                return
            del self._asked[ticket]
        _deliver(asked.recipient, asked.replies)

    def forget(self, role: EngineRole.ValueType) -> None:
        """Another scheduler takes over the engine."""
        with self._lock:
            self._asked = {ticket: asked for ticket, asked in self._asked.items() if asked.recipient.role != role}


def _deliver(recipient: Recipient, by_rank: Mapping[int, RoundReply]) -> None:
    replies = [by_rank[rank] for rank in sorted(by_rank)]
    if replies[0].HasField("move"):
        recipient.deliver_move(merge_moves([reply.move for reply in replies]))
        return
    for contents in split(common_digests([reply.disk.digests for reply in replies])):
        recipient.deliver_disk(contents)


def merge_moves(results: list[MoveResult]) -> MoveResult:
    """One move, as done by all ranks: a block that failed on any rank has failed."""
    return MoveResult(
        move_id=results[0].move_id,
        incarnation=results[0].incarnation,
        failed=sorted({index for result in results for index in result.failed}),
        error=next((result.error for result in results if result.error), ""),
        run_ns=max(result.run_ns for result in results),
        evicted=dict.fromkeys(digest for result in results for digest in result.evicted),
        num_damaged=sum(result.num_damaged for result in results),
        rank_run_ns=[result.run_ns for result in results],
    )


def common_digests(disks: list[Iterable[bytes]]) -> list[bytes]:
    """What every disk holds, in the order of the first."""
    others = [set(disk) for disk in disks[1:]]
    return [digest for digest in disks[0] if all(digest in other for other in others)]


def split(digests: list[bytes]) -> Iterator[DiskContents]:
    """One or more messages of at most a MiB."""
    for start in range(0, max(1, len(digests)), _DIGESTS_A_MESSAGE):
        end = start + _DIGESTS_A_MESSAGE
        yield DiskContents(digests=digests[start:end], is_last=end >= len(digests))
