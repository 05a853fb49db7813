"""The gate of a SwiGLU MLP: silu(gate) * up (arXiv 2002.05202)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate].

    Rows may be strided. An element's bits depend on its own gate and up only, not on where it lies in the batch.
    Raises ValueError unless gate_up is two-dimensional, floating, and even in its last dimension.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected [num_tokens, 2 * intermediate], got {list(gate_up.shape)}")
    if not gate_up.is_floating_point():
        raise ValueError(f"gate_up: expected a floating dtype, got {gate_up.dtype}")
    if gate_up.device.type == "cpu":
        return silu_and_mul_cpu(gate_up)
    return silu_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The definition, in fp32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def silu_and_mul_cpu(gate_up: Tensor) -> Tensor:
    """The fewest torch calls whose vectorised body and scalar tail round alike.

    Where a tail begins depends on the number of rows and threads. In 16-bit types F.silu rounds every input the same in
    both (tests try all 65,536), in fp32 it does not: there the quotient is spelled out in operators that do.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype != torch.float32:
        return F.silu(gate).mul_(up)
    denominator = torch.exp(gate.neg()).add_(1)
    return torch.div(gate, denominator, out=denominator).mul_(up)
