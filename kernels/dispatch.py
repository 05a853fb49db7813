"""Decides for all of kernels/ which implementation of an operator runs.

CUDA tensors take the Triton kernel. CPU tensors take the CPU path. In a process started with TRITON_INTERPRET=1 they
take the kernel through Triton's interpreter (for tests: it is slow, and Triton reads the variable at decoration).
"""

import torch
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret


def runs_triton(x: Tensor) -> bool:
    """Whether an operator on tensors like `x` launches its Triton kernel."""
    return x.is_cuda or INTERPRETED


def compiles_kernels(device: torch.device) -> bool:
    """Whether the first launch of a kernel there waits until it is compiled."""
    return device.type == "cuda" and not INTERPRETED
