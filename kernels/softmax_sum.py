"""The denominator of a softmax over a row or a shard of it, to be combined with those of other shards."""

import torch
from torch import Tensor

from kernels.sample import scale_by_temperature


def softmax_sum(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the scaled logits of each row, and the sum of exp(scaled logit - largest).

    Args:
        logits: fp32 [num_rows, num_tokens]; -Inf excludes a token.
        temperature: fp32 [num_rows]; 0 counts as 1.
    Returns:
        largest: fp32 [num_rows].
        total: fp32 [num_rows]; 0 where every token is excluded, NaN where a logit is.
    """
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    return softmax_sum_reference(logits, temperature)


def softmax_sum_reference(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    scaled = scale_by_temperature(logits, temperature)
    largest = scaled.amax(dim=1)
    base = torch.where(largest == -torch.inf, 0.0, largest)
    return largest, (scaled - base.unsqueeze(1)).exp().sum(dim=1)
