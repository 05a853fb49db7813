"""Attention on a CPU by attention.cpp: one call for all seqs of a batch. A row's bits depend on the row alone."""

import ctypes
import functools
import itertools
import logging
from collections.abc import Callable

import torch

from kernels.attention.call import AttentionCall
from kernels.kv.fp8 import KVScales, from_fp8, to_fp8
from kernels.native.library import load_library
from kernels.native.linear import DTYPES, why_not
from kernels.native.pool import pool

logger = logging.getLogger(__name__)

_LANES = 16  # features of a head come in multiples of the widest vector
_MAX_HEAD_DIM = 256
_MAX_GROUP = 32


def can_attend(call: AttentionCall) -> bool:
    """Whether `native_attention` can compute this call on this machine."""
    is_plain = call.lse is None and call.ancestors is None
    return is_plain and can_attend_heads(call.q.dtype, call.q.shape[2], group=call.group)


def can_attend_heads(dtype: torch.dtype, head_dim: int, *, group: int) -> bool:
    """Whether `native_attention` can compute heads of this kind on this machine. `group`: query heads of a KV head."""
    fits = head_dim % _LANES == 0 and head_dim <= _MAX_HEAD_DIM and group <= _MAX_GROUP
    return fits and dtype in DTYPES and why_not() is None and _is_right()


@functools.cache
def _is_right() -> bool:
    """As in `kernels.native.linear`: compare one call of each kind with its formula, because a compiler, or an
    instruction set never tested, may be wrong."""
    generator = torch.Generator().manual_seed(0)
    num_keys = 70  # more than a block
    for dtype, is_fp8 in itertools.product(DTYPES, (False, True)):
        q = torch.randn(2, 4, 48, generator=generator).to(dtype)
        k, v = torch.randn(2, 5, 16, 2, 48, generator=generator).to(dtype)
        scales = KVScales.of(k, v) if is_fp8 else None
        call = AttentionCall(
            q=q,
            k_cache=k if scales is None else to_fp8(k, scales.k),
            v_cache=v if scales is None else to_fp8(v, scales.v),
            block_table=torch.tensor([[3, 1, 4, 0, 2]], dtype=torch.int32),
            seq_lens=torch.tensor([num_keys], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
            out=torch.empty_like(q),
            lse=None,
            ancestors=None,
            softmax_scale=0.25,
            sliding_window=None,
            kv_scales=scales,
        )
        native_attention(call)
        if scales is not None:
            k, v = from_fp8(call.k_cache, scales.k, torch.float32), from_fp8(call.v_cache, scales.v, torch.float32)
        keys, values = (cache[[3, 1, 4, 0, 2]].flatten(0, 1)[:num_keys].double() for cache in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys.repeat_interleave(2, dim=1)) * 0.25
        scores[:, 0, -1] = -torch.inf
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), values.repeat_interleave(2, dim=1))
        error = (call.out.double() - expected).abs().max().item()
        if not error < expected.abs().max().item() * 2**-6:
            logger.warning("torch computes: attention in %s is off by %.3g on this CPU: please report it", dtype, error)
            return False
    return True


def native_attention(call: AttentionCall) -> None:
    """Write the results of a checked call that `can_attend` accepts to call.out. Sums are fp32, by position."""
    q, table, scales = call.q, call.block_table, call.kv_scales
    _function(q.dtype, is_fp8=scales is not None)(
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
        None if scales is None else scales.k.data_ptr(),
        None if scales is None else scales.v.data_ptr(),
    )


@functools.cache
def _function(dtype: torch.dtype, *, is_fp8: bool) -> Callable[..., None]:
    name = f"echelon_attention_{str(dtype).removeprefix('torch.')}{'_e4m3' if is_fp8 else ''}"
    function: Callable[..., None] = getattr(load_library(), name)
    pointer = ctypes.c_void_p
    function.argtypes = [pointer] * 8 + [ctypes.c_int64] * 9 + [ctypes.c_float] + [pointer] * 2  # type: ignore[attr-defined]
    function.restype = None  # type: ignore[attr-defined]
    return function
