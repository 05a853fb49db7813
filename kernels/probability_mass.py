"""Probabilities as integers, so that a sum over a vocabulary is the same in every order, sharding and batch."""

import torch
from torch import Tensor

from kernels.gumbel import LN2_HIGH, LN2_LOW

MASS_BITS = 43  # exp(0) has mass 2^43: the masses of fewer than 2^20 tokens add up within int64
MAX_TOKENS = 1 << 20
LOWEST_EXPONENT = -64.0  # exp(-64) * 2^43 is far below 1
CACHED_LOGITS = 1 << 16  # on CPU a sum takes so many at a time: its temporaries stay in the cache
LOG2_E = float.fromhex("0x1.715476p+0")
EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # relative error below 1e-8


def probability_mass(logits: Tensor, largest: Tensor) -> Tensor:
    """exp(logits - largest) in units of 2^-43, rounded down.

    Separate fp32 operations as in kernels/gumbel.py: the same integers on every device and in every position of a
    tensor (library exponentials differ between the vectorised body and the scalar tail of one tensor). Relative error
    below 2e-7; logits 30 and more below the largest have mass 0.

    Args:
        logits: fp32 [num_rows, num_tokens]; -Inf has mass 0; no NaN.
        largest: fp32 [num_rows], finite and not below any logit of its row.
    Returns:
        int64 [num_rows, num_tokens].
    """
    x = (logits - largest.unsqueeze(1)).clamp(min=LOWEST_EXPONENT)
    n = (x * LOG2_E + 0.5).floor()
    r = (x - n * LN2_HIGH) - n * LN2_LOW  # |r| <= log(2) / 2
    y = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r + coefficient
    scale = ((n.to(torch.int32) + (MASS_BITS + 127)) << 23).view(torch.float32)  # 2^(n + 43)
    return (y * scale).to(torch.int64)


def total_mass(logits: Tensor, largest: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Sum of the masses of each row, of the logits not below its threshold if there is one.

    fp32 [num_rows, num_tokens], [num_rows], [num_rows] -> int64 [num_rows].
    """
    num_rows, num_tokens = logits.shape
    width = max(1, CACHED_LOGITS // max(1, num_rows)) if logits.device.type == "cpu" else num_tokens
    total = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    for part in torch.split(logits, width, dim=1):
        mass = probability_mass(part, largest)
        if threshold is not None:
            mass = torch.where(part >= threshold.unsqueeze(1), mass, 0)
        total += mass.sum(dim=1)
    return total
