"""The probability that a model gives the chosen token, over a sharded vocabulary.

Every rank contributes two numbers per row. All ranks compute the answer from the same gathered bytes with the same IEEE
operations in rank order, so they get the same bits.
"""

import torch
from torch import Tensor

from kernels.sampling.noise_keys import scale_by_temperature
from kernels.sampling.probability_mass import probability_mass
from kernels.sampling.softmax_sum import softmax_sum

_NUM_WORDS = 2
LOWEST = torch.finfo(torch.float32).min


def confidence_words(logits: Tensor, temperature: Tensor, columns: Tensor) -> Tensor:
    """What this rank knows about each row, as bits: its best token's scaled logit, and its part of the softmax's sum.

    Args:
        logits: fp32 [num_rows, shard_size] without NaN.
        temperature: fp32 [num_rows]; 0 counts as 1.
        columns: int64 [num_rows], of this rank's best token.
    Returns:
        int64 [num_rows, 2].
    """
    chosen = scale_by_temperature(logits.gather(1, columns.unsqueeze(1)), temperature).squeeze(1)
    largest, total = softmax_sum(logits, temperature)
    return torch.stack((chosen, torch.zeros_like(chosen), largest, total), dim=1).view(torch.int64)


def confidences(words: Tensor, winner: Tensor) -> Tensor:
    """The softmax probability of the chosen token of each row.

    Args:
        words: int64 [tp_size, num_rows, 2], of all ranks.
        winner: int64 [num_rows], the rank whose token was chosen.
    Returns:
        fp32 [num_rows]; 0 where every token is excluded.
    """
    chosen, _, largest, total = words.view(torch.float32).unbind(dim=2)  # [tp_size, num_rows] each
    if words.shape[0] == 1:  # no other rank has to agree
        return torch.where(total > 0, (chosen - largest).exp_() / total, 0.0)[0]
    base = largest.amax(dim=0).clamp(min=LOWEST)
    weights = probability_mass(largest.T, base).to(torch.float64)  # [num_rows, tp_size], units cancel below
    denominator = torch.zeros_like(base, dtype=torch.float64)
    for rank, rank_total in enumerate(total.to(torch.float64)):
        denominator = denominator + weights[:, rank] * rank_total
    numerator = probability_mass(chosen.gather(0, winner.unsqueeze(0)).T, base).squeeze(1).to(torch.float64)
    return torch.where(denominator > 0, numerator / denominator, 0.0).to(torch.float32)
