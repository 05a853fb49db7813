"""How layers get their parameters: allocated here, filled later with this rank's slices of a checkpoint."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.layers.linear import Weight, linear, linear_batch_invariant, pack_weight
from workers.collectives import Group

Linear = Callable[[Tensor, Weight, Tensor | None], Tensor]


class Packable(Protocol):
    """A layer whose weight only `ctx.linear` reads."""

    weight: Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightSlice:
    """Part of a checkpoint tensor that this rank needs: target = tensor.narrow(dim, start, target.shape[dim])."""

    name: str
    full_shape: tuple[int, ...]  # of the checkpoint tensor, as checkpoint.weights expects it
    dim: int
    start: int
    target: Tensor  # a parameter or a view into a fused one


class BuildContext:
    """Settings for the constructors of layers, and the list of slices that they leave for the loader."""

    def __init__(self, group: Group, *, dtype: torch.dtype, device: torch.device, batch_invariant: bool) -> None:
        self.group = group
        self.dtype = dtype
        self.device = device
        self.batch_invariant = batch_invariant
        self.linear: Linear = linear_batch_invariant if batch_invariant else linear
        self._packable: list[Packable] = []
        self._sizes: list[int] = []
        self.slices: list[WeightSlice] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters allocated so far."""
        return sum(self._sizes)

    def over(self, group: Group) -> "BuildContext":
        """The same for layers that another group shares. Whatever either builds is counted, read and packed here."""
        other = copy.copy(self)
        other.group = group
        return other

    def empty(self, *shape: int) -> Tensor:
        """A parameter without contents; call `read` to say what fills it."""
        parameter = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._sizes.append(parameter.nbytes)
        return parameter

    def read(self, name: str, full_shape: tuple[int, ...], target: Tensor, *, dim: int = 0, start: int = 0) -> None:
        """Fill `target` from the checkpoint tensor `name`, narrowed along `dim` from `start` on."""
        self.slices.append(WeightSlice(name=name, full_shape=full_shape, dim=dim, start=start, target=target))

    def packable(self, layer: Packable) -> None:
        """Let the weight of `layer` change its layout once it is filled."""
        self._packable.append(layer)

    def pack(self) -> None:
        """Convert the filled weights, one at a time, to the layout that `linear` reads fastest."""
        self.slices.clear()  # they refer to the weights that are replaced
        for layer in self._packable:
            assert isinstance(layer.weight, Tensor), "a weight is packed once"
            layer.weight = pack_weight(layer.weight, batch_invariant=self.batch_invariant)

    def replicated(self, name: str, *shape: int) -> Tensor:
        """A parameter that every rank holds whole."""
        parameter = self.empty(*shape)
        self.read(name, shape, parameter)
        return parameter
