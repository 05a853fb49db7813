"""How layers get their parameters: allocated here, filled later with this rank's slices of a checkpoint."""

import copy
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from checkpoint.quantization import WeightFormat, head_format
from kernels.layers.linear import Weight, linear, linear_batch_invariant, pack_weight
from kernels.layers.quantized import QuantizedWeight, join_outputs, quantize_weight
from kernels.layers.quantized_linear import pack_quantized_weight
from workers.collectives import Group

MatrixFormat = WeightFormat | Literal["stored"] | None  # rounded to it; the bits of the checkpoint; the model's dtype
Linear = Callable[[Tensor, Weight, Tensor | None], Tensor]
_ALL = slice(None)


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
    parameter: Tensor
    rows: slice  # of the parameter, which may be a fused one

    @property
    def target(self) -> Tensor:
        return self.parameter[self.rows]


Read = Callable[[Sequence[WeightSlice]], None]
ReadBits = Callable[[WeightSlice], QuantizedWeight]


def _has_no_bits(part: WeightSlice) -> QuantizedWeight:
    raise AssertionError(f"{part.name}: no matrix keeps its bits")


class BuildContext:
    """Settings for the constructors of layers, and the list of slices that they leave for the loader."""

    def __init__(
        self,
        group: Group,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_invariant: bool,
        quantization: WeightFormat | None = None,  # to which matrices are rounded; not with batch_invariant
        kept: Container[str] = (),  # names of matrices that keep the few bits in which they are stored
    ) -> None:
        self.group = group
        self.dtype = dtype
        self.device = device
        self.batch_invariant = batch_invariant
        self.linear: Linear = linear_batch_invariant if batch_invariant else linear
        self._quantization = quantization
        self._kept = kept
        self._packable: list[tuple[Packable, MatrixFormat, bool]] = []
        self._sizes: list[int] = []
        self.slices: list[WeightSlice] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters made so far; those of rounded weights and of copies once they are filled."""
        return sum(self._sizes)

    def format_of(self, name: str) -> MatrixFormat:
        """How a matrix of a layer is held, and those that one product computes with it. `name`: with ".weight"."""
        return self._quantization or ("stored" if name in self._kept else None)

    @property
    def head_format(self) -> WeightFormat | None:
        return None if self._quantization is None else head_format(self._quantization)

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

    def matrix(self, out_features: int, in_features: int, format: MatrixFormat) -> Tensor:
        """As `empty`, for a weight that goes to `packable`. One with another format takes no memory yet."""
        if format is None:
            return self.empty(out_features, in_features)
        return torch.empty(out_features, in_features, dtype=self.dtype, device="meta")

    def read(
        self,
        name: str,
        full_shape: tuple[int, ...],
        parameter: Tensor,
        *,
        rows: slice = _ALL,
        dim: int = 0,
        start: int = 0,
    ) -> None:
        """Fill rows of a parameter from the checkpoint tensor `name`, narrowed along `dim` from `start` on."""
        self.slices.append(
            WeightSlice(name=name, full_shape=full_shape, dim=dim, start=start, parameter=parameter, rows=rows)
        )

    def packable(self, layer: Packable, format: MatrixFormat, *, is_shared: bool = False) -> None:
        """Let the weight of `layer` change its layout once it is filled, and its format. `is_shared`: another layer
        keeps the weight as it is, so a new layout is a copy."""
        self._packable.append((layer, format, is_shared))

    def fill(self, read: Read, read_bits: ReadBits = _has_no_bits) -> None:
        """Fill all parameters by `read`, which fills the targets of slices, and convert weights, one at a time, to the
        layout that `linear` reads fastest. A weight that is rounded exists in full only meanwhile, one that keeps its
        bits never: `read_bits` reads the bits of a slice."""
        read([part for part in self.slices if not part.parameter.is_meta])
        self.slices = [part for part in self.slices if part.parameter.is_meta]  # others refer to what is replaced
        for layer, format, is_shared in self._packable:
            assert isinstance(layer.weight, Tensor), "a weight is packed once"
            if format is None:
                layer.weight = self._packed(layer.weight, is_shared=is_shared)
            elif format == "stored":
                layer.weight = self._joined([read_bits(part) for part in self._slices_of(layer.weight)])
            else:
                layer.weight = self._rounded(layer.weight, format, read)
        self.slices.clear()

    def _packed(self, weight: Tensor, *, is_shared: bool) -> Weight:
        packed = pack_weight(weight, batch_invariant=self.batch_invariant)
        if is_shared and packed is not weight:
            self._sizes.append(weight.nbytes)
        return packed

    def _slices_of(self, weight: Tensor) -> list[WeightSlice]:
        return [part for part in self.slices if part.parameter is weight]

    def _joined(self, parts: list[QuantizedWeight]) -> Weight:
        """The weight whose outputs are those of the parts, one after another."""
        joined = join_outputs(parts).to(self.device)
        packed = pack_quantized_weight(joined, batch_invariant=self.batch_invariant)
        self._sizes.append(packed.nbytes)
        return packed

    def _rounded(self, weight: Tensor, format: WeightFormat, read: Read) -> Weight:
        if weight.is_meta:
            dense = torch.empty_like(weight, device=self.device)
            read([replace(part, parameter=dense) for part in self._slices_of(weight)])
            weight = dense
        rounded = pack_quantized_weight(quantize_weight(weight, format), rounds_inputs=True)
        self._sizes.append(rounded.nbytes)
        return rounded

    def replicated(self, name: str, *shape: int) -> Tensor:
        """A parameter that every rank holds whole."""
        parameter = self.empty(*shape)
        self.read(name, shape, parameter)
        return parameter
