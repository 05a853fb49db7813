"""Tensor collectives of one worker group, for layers and sampling."""

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Group(Protocol):
    """The ranks that share one model. Every rank makes the same calls in the same order. Each call blocks the caller
    (on CUDA: the current stream) until its result is there, and raises RuntimeError if a rank is lost or late."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks, in the dtype of `x`; the argument may be overwritten and must be contiguous."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """The `x` of every rank (same shape everywhere, contiguous): [size, *x.shape]."""
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The `x` of rank `source`. The `x` of every other rank (same shape, contiguous) is overwritten."""
        ...


class SoloGroup:
    """A group of one: no communication."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x


class TorchGroup:
    """A torch.distributed process group (gloo or NCCL).

    Calls the methods of the ProcessGroup directly: the functions of torch.distributed add some 20 us of logging to
    each call, and a decode step of a 32-layer model makes 65 calls.
    """

    def __init__(self, process_group: ProcessGroup, *, ordered_sum: bool) -> None:
        """`ordered_sum` makes sums independent of the batch around a row: partial sums are gathered, added in rank
        order in fp32 and rounded once. Without it the backend decides, and a ring adds the chunks of a tensor in an
        order that depends on the position of a row. For the few rows of a decode step, gloo is as fast either way. For
        the thousands of rows of a prefill, the gather moves size / 2 times as many bytes."""
        self._process_group = process_group
        self._ordered_sum = ordered_sum
        self.rank: int = process_group.rank()
        self.size: int = process_group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._ordered_sum and self.size > 2:  # a sum of two does not depend on the order
            return _sum_in_order(self.all_gather(x))
        self._process_group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size * x.numel(),), dtype=x.dtype, device=x.device)
        # Every torch that we support has it under this name; the public wrapper was renamed between 2.11 and 2.13.
        self._process_group._allgather_base(gathered, x.reshape(-1)).wait()
        return gathered.view(self.size, *x.shape)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        self._process_group.broadcast(x, source).wait()
        return x


def _sum_in_order(partials: Tensor) -> Tensor:  # [size, ...] -> [...]
    if not partials.dtype.is_floating_point:
        return partials.sum(dim=0, dtype=partials.dtype)
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial
    return total.to(partials.dtype)
