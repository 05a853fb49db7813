"""Products with weights of 4 and 8 bits on a CPU by quantized.cpp, and by integers.cpp, which rounds inputs too."""

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.native import linear
from kernels.native.library import load_library
from kernels.native.pool import pool

DTYPES = linear.DTYPES
_PANEL, _PANELS, _INPUTS = 16, 4, 32  # outputs of a panel; a packed weight has multiples of these panels and inputs
# With more rows, the products of linear.cpp gain more than it costs to expand the weight for them.
_MOST_DIRECT_ROWS, _ANY = 16, 2**62


class PackedCodes(ctypes.Structure):
    """As in quantized.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("group_size", ctypes.c_int64),
        ("most_direct_rows", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class NativeQuantizedWeight:
    """A weight [out_features, in_features] in the layout of quantized.cpp."""

    codes: Tensor  # uint8, flat
    scales: Tensor  # fp32 [num_panels, num_groups, 16]
    zeros: Tensor | None  # like scales
    table: Tensor | None  # fp32 [16], the values of codes of 4 bits; None: codes are int8
    shape: torch.Size
    address: PackedCodes  # of these tensors
    rounds_inputs: bool  # products of few rows are those of integers.cpp

    @property
    def num_bits(self) -> int:
        return 8 if self.table is None else 4

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's bits depend on the row alone, whatever the number of rows."""
        return bool(self.address.most_direct_rows == _ANY)


def why_not() -> str | None:
    """Why this machine cannot use these products; None if it can."""
    return linear.why_not() or _wrong_product()


@functools.cache
def _wrong_product() -> str | None:
    """As in `kernels.native.linear`: one product of each kind is compared with torch's."""
    generator = torch.Generator().manual_seed(0)
    for num_bits, dtype, rounds_inputs in itertools.product((4, 8), DTYPES, (False, True)):
        codes = torch.randint(0, 256, (35, 96 * num_bits // 8), generator=generator, dtype=torch.uint8)
        table = torch.arange(-8.0, 8) if num_bits == 4 else None
        scales = torch.full((35, 3), 0.25)
        weight = pack_quantized(codes, scales, table, group_size=32, in_features=96, rounds_inputs=rounds_inputs)
        values = codes.view(torch.int8).double() if table is None else table[_nibbles(codes)].double()
        x = torch.randn(9, 96, generator=generator).to(dtype)
        expected = x.double() @ values.T / 4
        error = (native_quantized_linear(x, weight).double() - expected).abs().max().item()
        if not error < expected.abs().max().item() * 2 ** (-5 if rounds_inputs else -7):
            return f"the compiled product of {num_bits}-bit weights is off by {error:.3g} on this CPU: please report it"
    return None


def _nibbles(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()


def pack_quantized(
    codes: Tensor,
    scales: Tensor,
    table: Tensor | None,
    *,
    group_size: int,
    in_features: int,
    zeros: Tensor | None = None,
    batch_invariant: bool = False,
    rounds_inputs: bool = False,
) -> NativeQuantizedWeight:
    """Pack a weight for `native_quantized_linear`; the caller drops the original.

    codes: contiguous bytes on the CPU, [out_features, in_features] if table is None, else [out_features, in_features /
    2 rounded up], element 2i in the low nibble of byte i; scales: fp32 [out_features, num_groups] for groups of
    `group_size` inputs, a multiple of 32 (or one group of any size); table: fp32 [16]; zeros: like scales, subtracted
    from the values of codes. batch_invariant: never expand the weight, which rounds many rows otherwise than few.
    rounds_inputs: round the inputs of few rows to 8 bits, where the CPU has fast products of such numbers
    (`can_round_inputs`) and there are no zeros. For drafts, whose results need not be exact.
    """
    out_features = codes.shape[0]
    num_panels = -(-out_features // (_PANEL * _PANELS)) * _PANELS
    padded_in = -(-in_features // _INPUTS) * _INPUTS
    num_bits = 8 if table is None else 4
    packed = torch.empty(num_panels * _PANEL * padded_in * num_bits // 8, dtype=torch.uint8)
    _functions(num_bits, torch.float32, rounds_inputs=False).pack(
        pool(), codes.data_ptr(), codes.shape[1], out_features, in_features, packed.data_ptr()
    )
    packed_scales = _in_panels(scales, num_panels)
    packed_zeros = None if zeros is None else _in_panels(zeros, num_panels)
    address = PackedCodes(
        packed.data_ptr(),
        packed_scales.data_ptr(),
        None if packed_zeros is None else packed_zeros.data_ptr(),
        None if table is None else table.data_ptr(),
        padded_in if scales.shape[1] == 1 else group_size,
        _ANY if batch_invariant else _MOST_DIRECT_ROWS,
    )
    shape = torch.Size((out_features, in_features))
    rounds_inputs = rounds_inputs and zeros is None and can_round_inputs()
    return NativeQuantizedWeight(packed, packed_scales, packed_zeros, table, shape, address, rounds_inputs)


@functools.cache
def can_round_inputs() -> bool:
    """Whether this CPU multiplies inputs of 8 bits faster than bf16. Raises CompileError if it cannot multiply here."""
    ask = load_library().echelon_rounds_inputs
    ask.restype = ctypes.c_bool
    return bool(ask())


def _in_panels(numbers: Tensor, num_panels: int) -> Tensor:
    """fp32 [out_features, num_groups] -> [num_panels, num_groups, 16]"""
    padded = torch.zeros(num_panels * _PANEL, numbers.shape[1])
    padded[: numbers.shape[0]] = numbers
    return padded.view(num_panels, _PANEL, -1).transpose(1, 2).contiguous()


def native_quantized_linear(x: Tensor, weight: NativeQuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, sums in fp32, rounded once.

    x: fp32 or bf16 [num_rows, in_features], rows may be strided; bias: contiguous [out_features] like x. Returns
    [num_rows, out_features]. For up to 16 rows, a row's bits depend on neither the other rows nor the number of
    threads, even where inputs are rounded. More rows are multiplied with weights that are rounded to the dtype of x
    first, unless the weight was packed with `batch_invariant`.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _functions(weight.num_bits, x.dtype, rounds_inputs=weight.rounds_inputs).linear(
        pool(),
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        ctypes.byref(weight.address),
        *weight.shape,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def product_address(weight: NativeQuantizedWeight, dtype: torch.dtype) -> int:
    """Where the function of quantized.cpp is in memory that multiplies rows of this dtype, for others in C++: in the
    place of a packed weight it takes the address of `weight.address`."""
    linear = _functions(weight.num_bits, dtype, rounds_inputs=weight.rounds_inputs).linear
    address = ctypes.cast(linear, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None, "a loaded function has an address"
    return address


class _Functions(NamedTuple):
    """Functions for one number of bits and one dtype."""

    pack: Callable[..., None]
    linear: Callable[..., None]


@functools.cache
def _functions(num_bits: int, dtype: torch.dtype, *, rounds_inputs: bool) -> _Functions:
    library, name = load_library(), str(dtype).removeprefix("torch.")
    pack = getattr(library, f"echelon_pack_codes{num_bits}")
    kind = "integers" if rounds_inputs else "codes"
    linear = getattr(library, f"echelon_linear_{kind}{num_bits}_{name}")
    size, address = ctypes.c_int64, ctypes.c_void_p
    pack.argtypes = [address, address, size, size, size, address]
    linear.argtypes = [address, address, size, size, address, size, size, address, address]
    pack.restype = linear.restype = None
    return _Functions(pack, linear)
