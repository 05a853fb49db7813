"""Matrices that a checkpoint stores in few bits, as dense ones: weight = (code - zero point) * scale, in fp32. Or with
their bits as they are, for products that take them."""

from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint.errors import LoadError
from checkpoint.stored_format import Layout, StoredFormat
from checkpoint.stored_matrices import StoredMatrix
from kernels.layers.quantized import QuantizedWeight, pack_nibbles

_WORD_BITS = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the outputs of a word: AWQ stores 0, 2, 4, 6, 1, 3, 5, 7

Codes = tuple[Tensor, Tensor | None, Tensor | None]  # codes [out, in]; zero points [out, groups]; groups of the inputs


def read_stored_matrix(matrix: StoredMatrix) -> Tensor:
    """The matrix in fp32, [out_features, in_features]. Reads all of it."""
    return dequantize(matrix.format, matrix.shape, _read(matrix))


def read_bits(matrix: StoredMatrix, *, dim: int, start: int, size: int) -> QuantizedWeight:
    """Rows (dim 0) or columns (dim 1) start .. start + size of the matrix, in the bits in which it is stored: a format
    of which `checkpoint.kept_bits` says that they can be kept. Reads all of it. Raises LoadError for inputs that are
    not in the order of their groups."""
    format, (out_features, in_features) = matrix.format, matrix.shape
    tensors = _read(matrix)
    codes, zeros, groups = _READERS[format.layout](format, out_features, tensors)
    group_size = format.block[1] or in_features
    if groups is not None and not torch.equal(groups, torch.arange(in_features) // group_size):
        raise LoadError(
            f"{matrix.file}: inputs are not in the order of their groups, so the weights cannot keep their bits",
            "set target.weights: dequantized",
        )
    scales = _scales(format, matrix.shape, tensors)[_block_rows(format, out_features)]
    rows = slice(start, start + size) if dim == 0 else slice(None)
    columns, of_groups = slice(None), slice(None)
    if dim == 1:
        columns, of_groups = slice(start, start + size), slice(start // group_size, -(-(start + size) // group_size))
    lowest = 2 ** (format.num_bits - 1) if format.layout in ("gptq", "awq") else 0  # their codes count from 0
    kept = (codes[:, :in_features][rows, columns] - lowest).to(torch.int8)
    return QuantizedWeight(
        "int8" if format.num_bits == 8 else "int4",
        kept.contiguous() if format.num_bits == 8 else pack_nibbles(kept),
        scales[rows, of_groups].contiguous(),
        kept.shape,
        min(group_size, kept.shape[1]),
        None if zeros is None else (zeros[rows, of_groups] - lowest).contiguous(),
    )


def _read(matrix: StoredMatrix) -> dict[str, Tensor]:
    """By the ends of their names."""
    tensors = {}
    for end, (name, info) in matrix.parts.items():
        with safe_open(info.file, framework="pt") as opened:
            tensors[end] = opened.get_tensor(name)
    return tensors


def _scales(format: StoredFormat, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 [blocks of outputs, groups]"""
    scales = tensors[format.scale].float()
    if format.layout in ("gptq", "awq"):
        scales = scales.T
    return scales.reshape(format.scale_shape(shape[0], shape[1]))


def _block_rows(format: StoredFormat, out_features: int) -> Tensor:
    """The row of scales of each output."""
    return torch.arange(out_features) // (format.block[0] or out_features)


def dequantize(format: StoredFormat, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """`tensors`: the parts of a matrix of this shape, by the ends of their names. fp32 [out_features, in_features].
    Raises LoadError for an order of the inputs that names a group that is not there."""
    out_features, in_features = shape
    codes, zeros, groups = _READERS[format.layout](format, out_features, tensors)
    scales = _scales(format, shape, tensors)
    if groups is None:
        groups = torch.arange(in_features) // (format.block[1] or in_features)
    if groups.max() >= scales.shape[1]:
        raise LoadError(f"an input is in group {int(groups.max())} of {scales.shape[1]}", "download the weights again")
    weight = codes[:, :in_features].float()
    if zeros is not None:
        weight -= zeros[:, groups]
    return weight.mul_(scales[:, groups][_block_rows(format, out_features)])


def _packed(format: StoredFormat, out_features: int, tensors: Mapping[str, Tensor]) -> Codes:
    """Codes count from the lowest, and their zero points too."""
    lowest = 2 ** (format.num_bits - 1)
    codes, zeros = _unpack(tensors["weight_packed"], format.num_bits) - lowest, None
    if format.has_zero_points:
        zeros = _unpack(tensors["weight_zero_point"].T, format.num_bits).T[:out_features].float() - lowest
    return codes, zeros, _order(tensors.get("weight_g_idx"))


def _plain(_format: StoredFormat, _out_features: int, tensors: Mapping[str, Tensor]) -> Codes:
    return tensors["weight"], None, None


def _gptq(format: StoredFormat, out_features: int, tensors: Mapping[str, Tensor]) -> Codes:
    zeros = _unpack(tensors["qzeros"], format.num_bits)[:, :out_features]
    zeros = (zeros + format.zero_offset) & (2**format.num_bits - 1)
    return _unpack(tensors["qweight"].T, format.num_bits), zeros.T.float(), _order(tensors.get("g_idx"))


def _awq(format: StoredFormat, _out_features: int, tensors: Mapping[str, Tensor]) -> Codes:
    codes, zeros = (
        _unpack(tensors[name], format.num_bits)
        .view(-1, len(_AWQ_PLACES))[:, _AWQ_PLACES]
        .view(tensors[name].shape[0], -1)
        for name in ("qweight", "qzeros")
    )
    return codes.T, zeros.T.float(), None


_READERS: Mapping[Layout, Callable[[StoredFormat, int, Mapping[str, Tensor]], Codes]] = {
    "packed": _packed,
    "plain": _plain,
    "gptq": _gptq,
    "awq": _awq,
}


def _order(groups: Tensor | None) -> Tensor | None:
    """The group of each input, where the file gives it: -1 stands for a file that does not."""
    return None if groups is None or (groups < 0).any() else groups.long()


def _unpack(words: Tensor, num_bits: int) -> Tensor:
    """int32 [rows, words] -> int16 [rows, words * 32 / num_bits], the lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, num_bits)
    numbers: Tensor = (words.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    return numbers.to(torch.int16).flatten(1)
