"""Copies of KV blocks on a CPU by blocks.cpp: one call for all blocks and layers, on the calling thread, without the
interpreter's lock."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.native.library import CompileError, load_library


def can_stage() -> bool:
    """Whether this machine can use `native_stage_blocks`."""
    try:
        load_library()
    except CompileError:
        return False
    return True


def native_stage_blocks(
    table: Tensor, block_ids: Tensor, staging: Tensor, rows: Tensor | None, *, gather: bool
) -> None:
    """Copy blocks of all layers into rows of `staging`, or back.

    table: int64 [2 * num_layers], addresses of the caches. block_ids, rows, staging: as for gather_blocks. They are not
    checked: a block or row that is not there is written to all the same.
    """
    rows = torch.arange(staging.shape[0]) if rows is None else rows
    item_bytes = staging.element_size()
    _function()(
        gather,
        table.data_ptr(),
        table.numel(),
        staging[0, 0, 0].numel() * item_bytes,
        block_ids.data_ptr(),
        rows.data_ptr(),
        block_ids.numel(),
        staging.data_ptr(),
        staging.stride(0) * item_bytes,
        staging.stride(1) * item_bytes,
    )


@functools.cache
def _function() -> Callable[..., None]:
    function: Callable[..., None] = load_library().echelon_stage_blocks
    size, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [  # type: ignore[attr-defined]
        ctypes.c_bool, address, size, size, address, address, size, address, size, size
    ]  # fmt: skip
    function.restype = None  # type: ignore[attr-defined]
    return function
