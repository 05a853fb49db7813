"""Weights in 8 and 4 bits, made from dense ones by rounding to the nearest, without calibration.

int8 and int4 are symmetric, as in the W8A16 and W4A16 schemes of compressed-tensors: weight = scale * code. A group is
all inputs of an output for int8, and 128 neighbouring inputs for int4 (the last group may be shorter). Its extreme, the
weight of the largest magnitude, becomes the lowest code, as in llama.cpp's Q4_0, or the highest, or that with the other
sign, whichever leaves the least squared error. So weights that were rounded in such groups before are found again.
Other codes are rounded to the nearest, ties to even, and clamped to the range. MXFP4 is in `kernels.layers.mxfp4`.

Weights that a checkpoint stores in such codes may have groups of other sizes, and zero points: weight = scale * (code -
zero).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.layers.mxfp4 import BLOCK_SIZE, ELEMENT_VALUES, dequantize_mxfp4, quantize_mxfp4, scale_values
from kernels.native import linear as native
from kernels.native import rounding

WeightFormat = Literal["int8", "int4", "mxfp4"]
_INT4_GROUP_SIZE = 128
_INT4_OFFSET = 8  # of a stored code
_AT_ONCE = 1 << 18  # elements: they stay in a cache


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [out_features, in_features] in few bits."""

    format: WeightFormat
    codes: Tensor  # int8: int8 [out, in]; else uint8 [out, in / 2, rounded up], element 2i in the low nibble of byte i
    scales: Tensor  # fp32 [out, num_groups]; mxfp4: uint8 [out, in / 32]
    shape: torch.Size
    group_size: int  # inputs that share a scale
    zeros: Tensor | None = None  # fp32 [out, num_groups]

    @property
    def table(self) -> Tensor | None:
        """The values of codes of 4 bits, fp32 [16]; None where codes are numbers."""
        if self.format == "int8":
            return None
        if self.format == "int4":
            return torch.arange(-_INT4_OFFSET, _INT4_OFFSET, dtype=torch.float32)
        magnitudes = torch.tensor(ELEMENT_VALUES)
        return torch.cat([magnitudes, -magnitudes])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def to(self, device: torch.device) -> "QuantizedWeight":
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros)

    @property
    def fp32_scales(self) -> Tensor:  # [out, num_groups]
        return scale_values(self.scales) if self.format == "mxfp4" else self.scales


def quantize_weight(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Round a weight [out_features, in_features], fp32, bf16 or fp16, to `format`.

    A group with NaN or infinity becomes NaN as a whole. Raises ValueError if MXFP4 does not fit the inputs.
    """
    if format == "mxfp4":
        return QuantizedWeight(format, *quantize_mxfp4(weight), weight.shape, BLOCK_SIZE)
    num_bits = 8 if format == "int8" else 4
    group_size = weight.shape[1] if format == "int8" else _INT4_GROUP_SIZE
    is_native = weight.device.type == "cpu" and weight.dtype in native.DTYPES and native.why_not() is None
    round_weight = rounding.round_weight if is_native else round_weight_reference
    codes, scales = round_weight(weight, num_bits, group_size)
    stored = codes if format == "int8" else pack_nibbles(codes)
    return QuantizedWeight(format, stored, scales, weight.shape, group_size)


def join_outputs(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same inputs and format as one: the outputs of the parts, one after another."""
    first = parts[0]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    zeros = None if first.zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
    return replace(first, codes=codes, scales=scales, zeros=zeros, shape=torch.Size((len(codes), first.shape[1])))


def dequantize_weight(weight: QuantizedWeight, rows: slice = slice(None)) -> Tensor:
    """The definition: these rows of the weight in fp32."""
    codes, scales = weight.codes[rows], weight.scales[rows]
    if weight.format == "mxfp4":
        return dequantize_mxfp4(codes, scales)
    if weight.format == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : weight.shape[1]].to(torch.int8)
        codes = codes - _INT4_OFFSET
    numbers: Tensor = codes if weight.zeros is None else codes - _for_each_input(weight, weight.zeros[rows])
    return numbers * _for_each_input(weight, scales)


def _for_each_input(weight: QuantizedWeight, of_groups: Tensor) -> Tensor:
    return of_groups.repeat_interleave(weight.group_size, dim=1)[:, : weight.shape[1]]


def round_weight_reference(weight: Tensor, num_bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The definition: codes int8 [out_features, in_features] and scales fp32 [out_features, num_groups]. A few rows at
    a time."""
    parts = [_round(rows, num_bits, group_size) for rows in weight.split(max(1, _AT_ONCE // max(1, weight.shape[1])))]
    codes, scales = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
    return codes, scales


def _round(weight: Tensor, num_bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    in_features = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -in_features % group_size))
    groups = padded.unflatten(1, (-1, group_size))
    extremes = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    extremes = torch.where(groups.isfinite().all(dim=2, keepdim=True), extremes, torch.nan)
    lowest, highest = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    codes, scales, errors = _round_to(groups, extremes / lowest, lowest, highest)
    for extreme_code in (highest, -highest):
        others = _round_to(groups, extremes / extreme_code, lowest, highest)
        is_better = others[2] < errors
        codes, scales, errors = (
            torch.where(is_better, theirs, ours) for theirs, ours in zip(others, (codes, scales, errors), strict=True)
        )
    return codes.to(torch.int8).flatten(1)[:, :in_features], scales.squeeze(2)


def _round_to(groups: Tensor, scales: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of groups [rows, groups, size] with these scales [rows, groups, 1], the scales, and the squared errors."""
    codes = (groups / scales).nan_to_num_(0.0).round_().clamp_(lowest, highest)  # 0 / 0: a group of zeros
    return codes, scales, (codes * scales - groups).square_().sum(dim=2, keepdim=True)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits, int8 [out, in] from -8 to 7, as QuantizedWeight holds them."""
    stored = torch.nn.functional.pad(codes + _INT4_OFFSET, (0, codes.shape[1] % 2)).to(torch.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4
