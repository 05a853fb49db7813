"""The threads of pool.hpp."""

import ctypes
import functools

import torch

from kernels.native.library import load_library


def pool() -> int:
    """Address of the process's thread pool. It has as many threads as torch; they sleep while there is no work."""
    return _pool(torch.get_num_threads())


@functools.cache
def _pool(num_threads: int) -> int:
    new_pool = load_library().echelon_new_pool
    new_pool.restype = ctypes.c_void_p
    address: int = new_pool(num_threads)
    return address
