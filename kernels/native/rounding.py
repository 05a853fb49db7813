"""Rounds weights to 4 or 8 bits on a CPU by rounding.cpp."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.native.library import load_library
from kernels.native.pool import pool


def round_weight(weight: Tensor, num_bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [out_features, in_features] and scales fp32 [out_features, num_groups], as `kernels.layers.quantized`
    defines them. Errors that differ by less than their own rounding may choose another scale.

    weight: fp32 or bf16 [out_features, in_features] on the CPU, rows may be strided. Raises CompileError where
    kernels.native.linear.why_not gives a reason.
    """
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    out_features, in_features = weight.shape
    codes = torch.empty(out_features, in_features, dtype=torch.int8)
    scales = torch.empty(out_features, -(-in_features // group_size))
    _function(weight.dtype)(
        pool(),
        weight.data_ptr(),
        out_features,
        in_features,
        weight.stride(0),
        group_size,
        -(2 ** (num_bits - 1)),
        2 ** (num_bits - 1) - 1,
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return codes, scales


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(load_library(), f"echelon_round_{str(dtype).removeprefix('torch.')}")
    address, size = ctypes.c_void_p, ctypes.c_int64
    number = ctypes.c_float
    function.argtypes = [address, address, size, size, size, size, number, number, address, address]
    function.restype = None
    return function  # type: ignore[no-any-return]
