"""How layers come by their parameters: allocated here, filled later with this rank's slices of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import linear_batch_invariant
from workers.groups import Group

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightSlice:
    """Part of a checkpoint tensor that this rank needs: target = tensor.narrow(dim, start, target.shape[dim])."""

    name: str
    full_shape: tuple[int, ...]  # of the tensor in the checkpoint
    dim: int
    start: int
    target: Tensor  # a parameter or a view into a fused one


class BuildContext:
    """What the constructor of a layer is told, and the list of slices that it leaves for the loader."""

    def __init__(self, group: Group, *, dtype: torch.dtype, device: torch.device, batch_invariant: bool) -> None:
        self.group = group
        self.dtype = dtype
        self.device = device
        self.batch_invariant = batch_invariant
        self.linear: Linear = linear_batch_invariant if batch_invariant else F.linear
        self.slices: list[WeightSlice] = []
        self.num_bytes = 0  # of all parameters allocated so far

    def empty(self, *shape: int) -> Tensor:
        """A parameter without contents: say with `read` what fills it."""
        parameter = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.num_bytes += parameter.nbytes
        return parameter

    def read(self, name: str, full_shape: tuple[int, ...], target: Tensor, *, dim: int = 0, start: int = 0) -> None:
        """Lets `target` be filled with checkpoint tensor `name`, narrowed along `dim` from `start` on."""
        self.slices.append(WeightSlice(name=name, full_shape=full_shape, dim=dim, start=start, target=target))

    def replicated(self, name: str, *shape: int) -> Tensor:
        """A parameter that every rank holds whole."""
        parameter = self.empty(*shape)
        self.read(name, shape, parameter)
        return parameter
