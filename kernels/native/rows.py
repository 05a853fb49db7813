"""Norms, the gate of the MLP and rotation on a CPU by rows.cpp: one call each, where torch needs up to ten.

A row's bits depend on the row alone, on any number of threads.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.native.library import load_library
from kernels.native.linear import DTYPES, why_not
from kernels.native.pool import pool

logger = logging.getLogger(__name__)


def can_compute(*rows: Tensor) -> bool:
    """Whether these functions take such tensors on this machine: on the CPU, in one of DTYPES, with dense rows."""
    return (
        all(x.dtype in DTYPES and x.stride(-1) == 1 for x in rows)
        and rows[0].is_cpu
        and why_not() is None
        and _are_right()
    )


@functools.cache
def _are_right() -> bool:
    """Whether these functions work here. As in `kernels.native.linear`, each is compared with its formula once."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(3, 2, 34, generator=generator).to(dtype)
        weight, flat, exact = x[0, 0].clone(), x.flatten(1), x.double()
        gate, up = exact.flatten(1).chunk(2, dim=1)
        angles = torch.rand(3, 1, 17, generator=generator)
        rotary = torch.stack((angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=2)))
        swapped = exact.roll(17, dims=2)
        cache = torch.zeros(2, 1, 3, 2, 34, dtype=dtype)
        q = x.clone()
        native_rotate_and_cache(q, x, x, rotary, torch.arange(3), *cache)
        rotated = exact * rotary[0].double() + swapped * rotary[1].double()
        pairs = (
            (native_rms_norm(x, None, weight, 0.5), exact / (exact.square().mean(2, True) + 0.5).sqrt() * exact[0, 0]),
            (native_silu_and_mul(flat), gate / (1 + (-gate).exp()) * up),
            (torch.stack((q, *cache[:, 0])), torch.stack((rotated, rotated, exact))),
        )
        for found, expected in pairs:
            if not (found.double() - expected).abs().max() < expected.abs().max() * 2**-7:
                logger.warning("torch computes: an operator on %s rows is wrong on this CPU: please report it", dtype)
                return False
    return True


def native_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; with a residual, of their sum, which replaces the residual.

    x, residual: [..., hidden] with up to two leading dimensions. Returns a contiguous tensor like x.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    num_inner, x_outer, x_inner = _inner_and_strides(x)
    _, residual_outer, residual_inner = _inner_and_strides(x if residual is None else residual)
    hidden = x.shape[-1]
    _functions(x.dtype).rms_norm(
        pool(),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // hidden,
        num_inner,
        hidden,
        x_outer,
        x_inner,
        residual_outer,
        residual_inner,
        eps,
    )
    return out


def native_silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate]."""
    num_rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, intermediate, dtype=gate_up.dtype)
    _functions(gate_up.dtype).silu_and_mul(
        pool(), gate_up.data_ptr(), out.data_ptr(), num_rows, intermediate, gate_up.stride(0)
    )
    return out


def native_rotate_and_cache(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """`reshape_and_cache` for arguments that it has checked, with its bits."""
    num_tokens, num_q_heads, head_dim = q.shape
    _functions(q.dtype).rotate_and_cache(
        pool(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        rotary.data_ptr(),
        slot_mapping.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        num_tokens,
        num_q_heads,
        k.shape[1],
        head_dim,
        rotary.shape[-1] // 2,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        rotary.stride(1),
        rotary.stride(0),
    )


def _inner_and_strides(x: Tensor) -> tuple[int, int, int]:
    """The length of the second last dimension, and the strides of the last two before rows."""
    if x.ndim == 3:
        return x.shape[1], x.stride(0), x.stride(1)
    return 1, (x.stride(0) if x.ndim == 2 else 0), 0


class _Functions(NamedTuple):
    rms_norm: Callable[..., None]
    silu_and_mul: Callable[..., None]
    rotate_and_cache: Callable[..., None]


@functools.cache
def _functions(dtype: torch.dtype) -> _Functions:
    suffix = str(dtype).removeprefix("torch.")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return _Functions(
        _function(f"echelon_rms_norm_{suffix}", [pointer] * 5 + [number] * 7 + [ctypes.c_float]),
        _function(f"echelon_silu_and_mul_{suffix}", [pointer] * 3 + [number] * 3),
        _function(f"echelon_rotate_and_cache_{suffix}", [pointer] * 8 + [number] * 13),
    )


def _function(name: str, argument_types: Sequence[type]) -> Callable[..., None]:
    function: Callable[..., None] = getattr(load_library(), name)
    function.argtypes = argument_types  # type: ignore[attr-defined]
    function.restype = None  # type: ignore[attr-defined]
    return function
