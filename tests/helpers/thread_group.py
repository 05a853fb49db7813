"""A group whose ranks are threads of one process, so a collective costs no more than a barrier."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Shared:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Tensor | None] = [None] * size
        self.num_collectives = 0


class ThreadGroup:
    """See workers.groups.Group; counts the collectives of its ranks."""

    def __init__(self, rank: int, shared: _Shared) -> None:
        self.rank = rank
        self.size = len(shared.slots)
        self._shared = shared

    @property
    def num_collectives(self) -> int:
        return self._shared.num_collectives

    def all_gather(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(), "a process group refuses this"
        self._shared.slots[self.rank] = x
        if self._shared.barrier.wait() == 0:
            self._shared.num_collectives += 1
        gathered = torch.stack([slot for slot in self._shared.slots if slot is not None])
        self._shared.barrier.wait()
        return gathered

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self.all_gather(x)[source].clone()

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_gather(x).sum(dim=0, dtype=x.dtype)


def run_ranks(size: int, function: Callable[[ThreadGroup], T]) -> list[T]:
    """Returns what the call of each rank returns; raises the failure of any rank."""
    shared = _Shared(size)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, shared))
        except BaseException as failure:  # noqa: BLE001 - raised in the caller's thread
            failures.append(failure)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(size)]
