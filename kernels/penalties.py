"""Logit processors that touch few tokens: penalties, bias, masks. All change `logits` in place.

An entry i stands for the logit at (rows[i], columns[i]); no pair occurs twice in one call.
"""

import torch
from torch import Tensor

# Far above any logit and far enough below the largest fp32 that dividing by a temperature cannot overflow.
LOGIT_LIMIT = 1e30


def apply_penalties(
    logits: Tensor, rows: Tensor, columns: Tensor, *, seen: Tensor, output_counts: Tensor, settings: Tensor
) -> None:
    """Penalises repeated tokens, with the meaning that vLLM gives the three settings.

    Args:
        logits: fp32 [num_rows, num_tokens].
        rows, columns: int64 [num_entries].
        seen: bool [num_entries], the token stands in the prompt or the output: its positive logit is divided by the
            repetition penalty, its negative one multiplied.
        output_counts: fp32 [num_entries], occurrences in the output: each costs the frequency penalty, the first one
            the presence penalty besides.
        settings: fp32 [num_rows, 3]: repetition, presence and frequency penalty.
    """
    repetition, presence, frequency = settings[rows].unbind(dim=1)
    values = logits[rows, columns]
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(seen, repeated, values)
    values = values - frequency * output_counts
    values = values - torch.where(output_counts > 0, presence, 0.0)
    logits[rows, columns] = values.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def apply_bias(logits: Tensor, rows: Tensor, columns: Tensor, bias: Tensor) -> None:
    """Adds bias (fp32 [num_entries])."""
    logits[rows, columns] += bias


def apply_mask(logits: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Excludes tokens; here a pair may occur more than once."""
    logits[rows, columns] = -torch.inf
