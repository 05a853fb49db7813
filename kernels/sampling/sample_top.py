"""The best few tokens of each row, in the order in which `sample` would choose them if better ones were missing."""

import torch
from torch import Tensor

from kernels.dispatch import runs_triton
from kernels.sampling.gumbel import gumbel_noise_range
from kernels.sampling.noise_keys import NoiseKeys, scale_by_temperature
from kernels.sampling.sample_cpu import top_keys_cpu
from kernels.sampling.sort_key import unpack_sort_key
from kernels.sampling.tile import check_logits, check_row_values
from kernels.sampling.top_keys import top_keys_triton, top_sort_keys_reference


def sample_top(
    logits: Tensor,
    temperature: Tensor,
    keys: NoiseKeys,
    *,
    num: int,
    first_token_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `num` tokens of each row with the largest logit / temperature + noise, best first; of equal ones the lowest
    id comes first. Column 0 is the result of `sample`, which defines the other arguments.

    Args:
        num: a small number; the kernel's time grows with it.
    Returns:
        values: fp32 [num_rows, num], scaled logit plus noise; -Inf where a row has no more tokens.
        token_ids: int64 [num_rows, num]; first_token_id where the value is -Inf.
    """
    check_logits(logits)
    check_row_values(logits, torch.float32, temperature=temperature, thresholds=thresholds)
    check_row_values(
        logits, torch.int64, seeds=keys.seeds, sample_indices=keys.sample_indices, positions=keys.positions
    )
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    if runs_triton(logits):
        sort_keys = top_keys_triton(
            logits, num, first_token_id=first_token_id, temperature=temperature, keys=keys, thresholds=thresholds
        )
    else:
        sort_keys = top_keys_cpu(
            logits, temperature, keys, num=num, first_token_id=first_token_id, thresholds=thresholds
        )
    return _unpack(sort_keys, first_token_id)


def sample_top_reference(
    logits: Tensor,
    temperature: Tensor,
    keys: NoiseKeys,
    *,
    num: int,
    first_token_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_top` in its simplest form: noise for every token, and a sort."""
    noise = gumbel_noise_range(
        keys.seeds, keys.sample_indices, keys.positions, first_token_id=first_token_id, num_tokens=logits.shape[1]
    )
    scaled = scale_by_temperature(logits, temperature)
    if thresholds is not None:
        scaled = scaled.masked_fill(scaled < thresholds.unsqueeze(1), -torch.inf)
    values = scaled + torch.where((temperature > 0).unsqueeze(1), noise, 0.0)
    return _unpack(top_sort_keys_reference(values, num, first_token_id=first_token_id), first_token_id)


def _unpack(sort_keys: Tensor, first_token_id: int) -> tuple[Tensor, Tensor]:
    values, token_ids = unpack_sort_key(sort_keys)
    return values, torch.where(values > -torch.inf, token_ids, first_token_id)
