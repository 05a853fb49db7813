"""Seqs that wait for a slot, oldest first."""

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from scheduler.requests.request import Seq

_by_order = attrgetter("order")


class WaitingQueue:
    """Ordered by arrival. A preempted seq is older than all that have never run, so it comes back first."""

    def __init__(self) -> None:
        self._seqs: list[Seq] = []

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Seq]:
        return iter(self._seqs)

    def push(self, seq: Seq) -> None:
        insort(self._seqs, seq, key=_by_order)

    def first(self) -> Seq | None:
        return self._seqs[0] if self._seqs else None

    def remove(self, seq: Seq) -> None:
        self._seqs.remove(seq)
