"""Products with weights in few bits (`kernels.layers.quantized`), made for the few rows of a draft's step.

The speed of such a step is that of reading the weights. On a CPU, kernels/native reads 4 or 8 bits for each of them; it
took less CPU time than torch's `_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm` for 1 to 16 rows (see
docs/kernels.md). On CUDA, Triton kernels do so: `kernels.layers.mxfp4_linear` and `kernels.layers.integer_linear`.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import runs_triton
from kernels.layers.integer_linear import MAX_KERNEL_ROWS, integer_linear, takes_groups_of
from kernels.layers.mxfp4_linear import mxfp4_linear
from kernels.layers.quantized import QuantizedWeight, dequantize_weight
from kernels.native import quantized as native
from kernels.native.quantized import NativeQuantizedWeight

AnyQuantizedWeight = QuantizedWeight | NativeQuantizedWeight
_INPUTS_TOGETHER, _MOST_ROUNDED_TOGETHER = 32, 128  # as in kernels/native: a multiple of these; that share a scale
# Weights that are dequantised at a time: they stay in the cache of a core; on CUDA, enough for all multiprocessors.
_TILE_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}


def pack_quantized_weight(
    weight: QuantizedWeight, *, batch_invariant: bool = False, rounds_inputs: bool = False
) -> AnyQuantizedWeight:
    """Convert a weight to the layout that is read fastest; the caller drops the original.

    batch_invariant: it is for `linear_batch_invariant`, which not every machine can offer. rounds_inputs: products of
    few rows may round their inputs to 8 bits (`rounded_inputs_reference`), where that is faster.
    """
    if weight.codes.device.type != "cpu" or runs_triton(weight.codes) or native.why_not():
        return weight
    return native.pack_quantized(
        weight.codes.contiguous(),
        weight.fp32_scales,
        weight.table,
        group_size=weight.group_size,
        in_features=weight.shape[1],
        zeros=weight.zeros,
        batch_invariant=batch_invariant,
        rounds_inputs=rounds_inputs,
    )


def quantized_linear(x: Tensor, weight: AnyQuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, sums in fp32, rounded once.

    x: fp32, bf16 or fp16 [num_rows, in_features]; bias: [out_features] like x. Returns [num_rows, out_features] like x.
    Many rows are multiplied with a dense copy of the weight in the dtype of x, made anew in each call, and so may round
    otherwise than few.
    """
    if isinstance(weight, NativeQuantizedWeight):
        if x.dtype in native.DTYPES:
            return native.native_quantized_linear(x, weight, bias)
        return quantized_linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    if weight.format == "mxfp4" and runs_triton(x):
        y = mxfp4_linear(x, weight.codes, weight.scales)
        return y if bias is None else y + bias
    if runs_triton(x) and x.shape[0] <= MAX_KERNEL_ROWS and takes_groups_of(weight.group_size, weight.shape[1]):
        num_bits = 8 if weight.format == "int8" else 4
        codes, scales, zeros = weight.codes, weight.scales, weight.zeros
        return integer_linear(x, codes, scales, zeros, bias, num_bits=num_bits, group_size=weight.group_size)
    return _multiply_dense_tiles(x, weight, bias)


def quantized_linear_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The definition: dequantise, multiply in fp32."""
    return F.linear(x.float(), dequantize_weight(weight), None if bias is None else bias.float()).to(x.dtype)


def rounded_inputs_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The definition of products whose inputs are rounded too (`round_inputs`). Sums of a group are whole numbers (or
    halves), exact in any order. They are scaled and added in fp32 in the order of the groups."""
    in_features = weight.shape[1]
    weight_group = weight.group_size if weight.group_size < in_features else _padded(in_features)
    codes, scales = round_inputs(x, weight_group)
    one = torch.full_like(weight.scales, 127 if weight.format == "mxfp4" else 1)  # mxfp4: an exponent
    values = _in_groups(dequantize_weight(replace(weight, scales=one)), codes.shape[2])
    y = torch.zeros(x.shape[0], weight.shape[0])
    for group in range(codes.shape[1]):
        products = (codes[:, group].double() @ values[:, group].double().T).float()
        y += products * scales[:, group] * weight.fp32_scales[:, group * codes.shape[2] // weight_group]
    return (y if bias is None else y + bias.float()).to(x.dtype)


def round_inputs(x: Tensor, weight_group: int) -> tuple[Tensor, Tensor]:
    """Inputs [num_rows, in_features] in groups of at most 128 that share a scale, none longer than a weight's: codes of
    8 bits [num_rows, num_groups, group_size] as fp32, zeros after the last input, and scales [num_rows, num_groups, 1].
    The largest of a group becomes 127 or -127, others the nearest code, ties the even one."""
    groups = _in_groups(x.float(), math.gcd(_MOST_ROUNDED_TOGETHER, weight_group, _padded(x.shape[1])))
    largest = groups.abs().amax(dim=2, keepdim=True)
    inverses = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)
    return (groups * inverses).round(), largest / 127


def _padded(num_inputs: int) -> int:
    return -(-num_inputs // _INPUTS_TOGETHER) * _INPUTS_TOGETHER


def _in_groups(matrix: Tensor, size: int) -> Tensor:
    groups: Tensor = F.pad(matrix, (0, _padded(matrix.shape[1]) - matrix.shape[1])).unflatten(1, (-1, size))
    return groups


def _multiply_dense_tiles(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A few output features at a time. Saves memory, not time."""
    out_features, in_features = weight.shape
    features_at_once = max(1, _TILE_WEIGHTS[x.device.type] // max(1, in_features))
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    for start in range(0, out_features, features_at_once):
        tile = slice(start, start + features_at_once)
        out[:, tile] = F.linear(x, dequantize_weight(weight, tile).to(x.dtype), None if bias is None else bias[tile])
    return out
