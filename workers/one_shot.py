"""Sums of small tensors over the GPUs of a node, in one launch each.

A decode step makes two sums of a few KB for each layer, and most of what NCCL takes for one is waiting: its ranks pass
parts from one to the next. Here each rank puts its part into memory that all ranks have mapped, and a kernel of torch
reads all parts and adds them in order of rank (TensorRT-LLM and vLLM do the same). It is a part of captured steps like
any other kernel. Large tensors take longer this way, since every rank reads all of them.

torch.distributed._symmetric_memory may change, and not every machine has what it needs. So Cohort opens and probes it
at start, and goes on without it unless all ranks are content.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from workers.collectives import Group

_MAX_BYTES = 256 << 10  # of a tensor that is summed so; not measured
_SIZES = (2, 4, 8)  # groups for which torch's kernel adds in the same order on all ranks
_ALIGNED_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float32)  # that the kernel adds

Add = Callable[[Tensor], Tensor]  # the sum of the parts that all ranks have put into their memory


class OneShotGroup:
    """A Group in which `add` sums small tensors that are first copied into `shared`. `group` does everything else."""

    def __init__(self, group: Group, shared: Tensor, add: Add) -> None:
        """shared: uint8 [_MAX_BYTES], mapped by all ranks."""
        self._group = group
        self._shared = shared
        self._add = add
        self.rank: int = group.rank
        self.size: int = group.size

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype not in _DTYPES or x.nbytes > _MAX_BYTES or x.nbytes % _ALIGNED_BYTES or x.nbytes == 0:
            return self._group.all_reduce(x)
        part = self._shared[: x.nbytes].view(x.dtype)
        part.copy_(x.view(-1))
        return self._add(part).view(x.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._group.all_gather(x)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._group.broadcast(x, source)


def is_allowed() -> bool:
    """ECHELON_ONE_SHOT=off is for a machine on which the kernel hangs, which no probe can notice."""
    choice = os.environ.get("ECHELON_ONE_SHOT", "auto")
    if choice not in ("auto", "off"):
        raise ValueError(f"ECHELON_ONE_SHOT: {choice!r} must be auto or off")
    return choice == "auto"


def can_keep_bits(size: int, *, ordered_sum: bool) -> bool:
    """Whether small sums may be added so. Ordered sums are rounded once, and torch's kernel rounds after each addition:
    a row must not get other bits in a small batch than in a large one. With two ranks there is one addition."""
    return size in _SIZES and (size == 2 or not ordered_sum)


def open_one_shot(group: Group, process_group: ProcessGroup, device: torch.device) -> OneShotGroup:
    """All ranks of the group call it. Raises whatever torch does where that cannot be."""
    # Each worker sees one GPU, its device 0, and torch would take them for the same. Cohort knows that they are not.
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    from torch.distributed import _symmetric_memory as symmetric_memory

    one_shot = torch.ops.symm_mem.one_shot_all_reduce
    shared = symmetric_memory.empty(_MAX_BYTES, dtype=torch.uint8, device=device)
    symmetric_memory.rendezvous(shared, process_group.group_name)
    return OneShotGroup(group, shared, lambda part: one_shot(part, "sum", process_group.group_name))
