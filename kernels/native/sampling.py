"""The choice of tokens on a CPU by sampling.cpp, with the bits of kernels/sampling."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.native.library import load_library
from kernels.native.linear import why_not
from kernels.native.pool import pool

RowSettings = np.ndarray[tuple[int], np.dtype[np.void]]  # ROW_SETTINGS [num_rows]
_MAX_BEST = 65  # tokens of a row
# What decides the token of a row besides its logits, as in sampling.hpp. A greedy row has temperature 0. A threshold of
# -Inf excludes nothing, nor do top_k 0, top_p 1 and log_min_p -Inf.
ROW_SETTINGS = np.dtype(
    [
        ("seed", np.int64),
        ("sample_index", np.int64),
        ("position", np.int64),
        ("temperature", np.float32),
        ("threshold", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("log_min_p", np.float32),
    ],
    align=True,
)


class Chosen(ctypes.Structure):
    """Where the choices go, as in sampling.hpp."""

    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("confidences", ctypes.c_void_p),
        ("is_finite", ctypes.c_void_p),
        ("num_best", ctypes.c_int),
    )


def can_choose(logits: Tensor, *, num: int = 1) -> bool:
    """Whether `native_choose` finds the `num` best tokens of such logits on this machine."""
    return logits.is_cpu and num <= _MAX_BEST and why_not() is None


def native_choose(logits: Tensor, settings: RowSettings, *, num: int, first_token_id: int) -> tuple[Tensor, Tensor]:
    """The `num` best tokens of each row, best first: values fp32 [num_rows, num], ids int64 [num_rows, num].

    logits: fp32 [num_rows, num_tokens], rows without gaps. settings: ROW_SETTINGS [num_rows]. The value is the scaled
    logit plus noise; after a row's last token it is -Inf, and the id first_token_id.
    """
    num_rows, num_tokens = logits.shape
    values = torch.empty(num_rows, num)
    token_ids = torch.empty(num_rows, num, dtype=torch.int64)
    chosen = Chosen(token_ids=token_ids.data_ptr(), values=values.data_ptr(), num_best=num)
    _choose()(
        pool(),
        logits.data_ptr(),
        num_rows,
        num_tokens,
        logits.stride(0),
        first_token_id,
        settings.ctypes.data,
        ctypes.byref(chosen),
    )
    return values, token_ids


@functools.cache
def _choose() -> Callable[..., None]:
    function: Callable[..., None] = load_library().echelon_choose_float32
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, number, number, number, number, pointer, pointer]  # type: ignore[attr-defined]
    function.restype = None  # type: ignore[attr-defined]
    return function
