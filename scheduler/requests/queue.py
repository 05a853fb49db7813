"""Seqs that wait for a slot."""

from bisect import insort
from collections.abc import Iterable, Iterator
from operator import attrgetter

from scheduler.requests.request import Seq

_by_order = attrgetter("order")


class WaitingQueue:
    """Fair to tenants: the next to start is of the tenant with the fewest running seqs, of several such tenants the one
    that has not started a seq for the longest time, and of a tenant's own the oldest.

    A seq of a request that has run before, such as a preempted one, comes back before all others. Background seqs start
    when no other waits, by the same rules among themselves.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str, list[Seq]] = {}  # each by arrival, none empty
        self._num_started = 0
        self._last_start: dict[str, int] = {}  # of tenants that wait and have started a seq meanwhile

    def __len__(self) -> int:
        return sum(map(len, self._by_tenant.values()))

    def __iter__(self) -> Iterator[Seq]:
        """Oldest first, background last."""
        return iter(sorted((seq for seqs in self._by_tenant.values() for seq in seqs), key=_by_order))

    def push(self, seq: Seq) -> None:
        insort(self._by_tenant.setdefault(seq.request.tenant, []), seq, key=_by_order)

    def first(self, running: Iterable[Seq]) -> Seq | None:
        """The seq to start next, while `running` run."""
        heads = [seqs[0] for seqs in self._by_tenant.values()]
        if not all(seq.request.is_background for seq in heads):
            heads = [seq for seq in heads if not seq.request.is_background]
        if len(heads) <= 1:
            return heads[0] if heads else None
        num_running = dict.fromkeys(self._by_tenant, 0)
        for seq in running:
            if seq.request.tenant in num_running:
                num_running[seq.request.tenant] += 1

        returning = [seq for seq in heads if seq.request.admitted_s is not None]
        if returning:
            return min(returning, key=_by_order)

        def turn(seq: Seq) -> tuple[int, int, tuple[bool, int, int]]:
            tenant = seq.request.tenant
            return num_running[tenant], self._last_start.get(tenant, 0), seq.order

        return min(heads, key=turn)

    def start(self, seq: Seq) -> None:
        """Removes the seq; it is another tenant's turn."""
        self._num_started += 1
        self._last_start[seq.request.tenant] = self._num_started
        self.remove(seq)

    def remove(self, seq: Seq) -> None:
        seqs = self._by_tenant[seq.request.tenant]
        seqs.remove(seq)
        if not seqs:
            del self._by_tenant[seq.request.tenant]
            self._last_start.pop(seq.request.tenant, None)
