"""Products on a CPU by linear.cpp. Few rows run at the speed of memory, and a row's bits depend on the row alone.

torch's libraries read weights slowly if rows are few. On an AMD EPYC with only AVX2 and two threads, they read a bf16
weight of [9216, 1536] at 1 to 4 GB/s, and an fp32 weight for 2 to 8 rows at 1 to 2 GB/s. linear.cpp reads both at 12 to
22 GB/s (see docs/kernels.md).
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.native.library import CompileError, load_library
from kernels.native.pool import pool

DTYPES = (torch.float32, torch.bfloat16)
_OUTPUTS, _INPUTS = 64, 32  # a packed weight has multiples of these, as in linear.cpp


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """A weight [out_features, in_features] in the layout of linear.cpp."""

    packed: Tensor  # flat
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device


def why_not() -> str | None:
    """Why this machine cannot use the native kernels; None if it can."""
    try:
        load_library()
    except CompileError as error:
        return str(error)
    return _wrong_product()


@functools.cache
def _wrong_product() -> str | None:
    """Compare one product of each kind, because a compiler, or an instruction set never tested, may be wrong."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x, weight = (torch.randn(rows, 67, generator=generator).to(dtype) for rows in (41, 35))
        expected = x.double() @ weight.double().T
        error = (native_linear(x, pack(weight)).double() - expected).abs().max().item()
        if not error < expected.abs().max().item() * 2**-7:
            return f"the compiled product of {dtype} matrices is off by {error:.3g} on this CPU: please report it"
    return None


def pack(weight: Tensor) -> NativeWeight:
    """Pack a weight for `native_linear`; the caller drops the original.

    weight: [out_features, in_features] on the CPU, in one of DTYPES. Raises CompileError if `why_not` returns a reason.
    """
    out_features, in_features = weight.shape
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    padded = -(-out_features // _OUTPUTS) * _OUTPUTS * -(-in_features // _INPUTS) * _INPUTS
    packed = torch.empty(padded, dtype=weight.dtype)
    _functions(weight.dtype).pack(
        pool(), weight.data_ptr(), out_features, in_features, weight.stride(0), packed.data_ptr()
    )
    return NativeWeight(packed, weight.shape)


def native_linear(x: Tensor, weight: NativeWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. Sums are fp32, in the order of the inputs, rounded once.

    x: [num_rows, in_features], rows may be strided; bias: contiguous [out_features]; all of one dtype. Returns
    [num_rows, out_features]. A row's bits depend on neither the other rows nor the number of threads.
    """
    out_features, in_features = weight.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype)
    _functions(x.dtype).linear(
        pool(),
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        weight.packed.data_ptr(),
        out_features,
        in_features,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def product_address(dtype: torch.dtype) -> int:
    """Where the function of linear.cpp that multiplies weights of this dtype is in memory, for others in C++."""
    address = ctypes.cast(_functions(dtype).linear, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None, "a loaded function has an address"
    return address


class _Functions(NamedTuple):
    """The functions of linear.cpp for one dtype."""

    pack: Callable[..., None]
    linear: Callable[..., None]


@functools.cache
def _functions(dtype: torch.dtype) -> _Functions:
    name = str(dtype).removeprefix("torch.")
    pack, linear = (getattr(load_library(), f"echelon_{verb}_{name}") for verb in ("pack", "linear"))
    size, address = ctypes.c_int64, ctypes.c_void_p
    pack.argtypes = [address, address, size, size, size, address]
    linear.argtypes = [address, address, size, size, address, size, size, address, address]
    pack.restype = linear.restype = None
    return _Functions(pack, linear)
