"""Min-p, top-k and top-p as one threshold per row: a token stays if its scaled logit is not below it.

Ties at a threshold stay, so the set depends neither on how a sort orders ties nor on how the vocabulary is sharded.
The functions use the largest logits of a vocabulary and report whether these were enough, so the shards of a
vocabulary need to exchange only a few candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling.probability_mass import probability_mass


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Settings of each row; tensors [num_rows]."""

    log_min_p: Tensor  # fp32, -Inf is off
    top_k: Tensor  # int64, 0 is off
    top_p: Tensor  # fp64, 1 is off
    max_top_k: int  # over the rows
    has_top_p: bool  # any row

    def select(self, rows: Tensor) -> "Truncation":
        return Truncation(
            log_min_p=self.log_min_p[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            max_top_k=self.max_top_k,
            has_top_p=self.has_top_p,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The largest scaled logits of each row of a vocabulary."""

    values: Tensor  # fp32 [num_rows, num_candidates], descending; the first is the largest of the row
    rest: Tensor  # fp32 [num_rows]: no logit outside the candidates is above it; -Inf if none is missing


def min_p_top_k_threshold(candidates: Candidates, truncation: Truncation) -> tuple[Tensor, Tensor]:
    """The threshold that min-p and top-k set together, and whether the candidates prove it.

    Returns:
        threshold: fp32 [num_rows].
        covered: bool [num_rows]; where it is False the threshold is void.
    """
    values, top_k = candidates.values, truncation.top_k
    num_candidates = values.shape[1]
    kth = values.gather(1, (top_k - 1).clamp(0, num_candidates - 1).unsqueeze(1)).squeeze(1)
    kth = torch.where((top_k > 0) & (top_k <= num_candidates), kth, -torch.inf)
    threshold = torch.maximum(values[:, 0] + truncation.log_min_p, kth)
    # Every logit above `rest` is a candidate. So a k-th candidate at or above `rest` is the k-th of all. If it is
    # below, the k-th of all is not above `rest`.
    return threshold, (top_k == 0) | (threshold >= candidates.rest)


def top_p_threshold(
    candidates: Candidates, truncation: Truncation, threshold: Tensor, total_mass: Tensor
) -> tuple[Tensor, Tensor]:
    """The threshold that top-p sets on what min-p and top-k leave, and whether the candidates prove it.

    Args:
        threshold: fp32 [num_rows], of min-p and top-k.
        total_mass: int64 [num_rows], of the tokens of the whole vocabulary that are not below this threshold.
    Returns:
        threshold: fp32 [num_rows], not below the given one.
        covered: bool [num_rows].
    """
    values = candidates.values
    # Tokens below the threshold come last, so the mass is reached before them.
    reached = probability_mass(values, values[:, 0]).cumsum(dim=1)
    wanted = (truncation.top_p * total_mass.to(torch.float64)).ceil().to(torch.int64)
    last = (reached < wanted.unsqueeze(1)).sum(dim=1)  # index of the candidate that reaches the wanted mass
    found = last < values.shape[1]
    last_value = values.gather(1, last.clamp(max=values.shape[1] - 1).unsqueeze(1)).squeeze(1)
    off = truncation.top_p >= 1
    tightened = torch.where(off, threshold, torch.maximum(threshold, last_value))
    return tightened, off | (found & (last_value >= candidates.rest))
