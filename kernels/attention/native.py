"""Attention on a CPU by attention.cpp: one call for all seqs of a batch. A row's bits depend on the row alone."""

import ctypes
import functools
from collections.abc import Callable

import torch

from kernels.attention.call import AttentionCall
from kernels.native.library import load_library
from kernels.native.linear import DTYPES, why_not
from kernels.native.pool import pool

_LANES = 16  # features of a head come in multiples of the widest vector
_MAX_HEAD_DIM = 256
_MAX_GROUP = 32


def can_attend(call: AttentionCall) -> bool:
    """Whether `native_attention` can compute this call on this machine."""
    q = call.q
    return (
        q.dtype in DTYPES
        and call.lse is None
        and call.ancestors is None
        and q.shape[2] % _LANES == 0
        and q.shape[2] <= _MAX_HEAD_DIM
        and call.group <= _MAX_GROUP
        and why_not() is None
    )


def native_attention(call: AttentionCall) -> None:
    """Write the results of a checked call that `can_attend` accepts to call.out. Sums are fp32, by position."""
    q, table = call.q, call.block_table
    _function(q.dtype)(
        pool(),
        q.data_ptr(),
        call.k_cache.data_ptr(),
        call.v_cache.data_ptr(),
        table.data_ptr(),
        call.seq_lens.data_ptr(),
        call.cu_seqlens_q.data_ptr(),
        call.out.data_ptr(),
        table.shape[0],
        call.k_cache.shape[1],
        call.num_kv_heads,
        call.group,
        q.shape[2],
        call.sliding_window or 0,
        q.stride(0),
        q.stride(1),
        table.stride(0),
        call.softmax_scale,
    )


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(load_library(), f"echelon_attention_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 9 + [ctypes.c_float]  # type: ignore[attr-defined]
    function.restype = None  # type: ignore[attr-defined]
    return function
