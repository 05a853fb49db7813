"""The best few tokens of each row, in the order in which `sample` would choose them if better ones were missing."""

import torch
from torch import Tensor

from kernels.dispatch import runs_triton
from kernels.native.sampling import can_choose, native_choose
from kernels.sampling.noise_keys import NoiseKeys, row_settings
from kernels.sampling.sample import check_arguments, noisy_logits_reference
from kernels.sampling.sample_cpu import top_keys_cpu
from kernels.sampling.sort_key import unpack_sort_key
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
    check_arguments(logits, temperature, keys, thresholds)
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    if not runs_triton(logits) and can_choose(logits, num=num):
        return native_choose(
            logits, row_settings(temperature, keys, thresholds), num=num, first_token_id=first_token_id
        )
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
    values = noisy_logits_reference(logits, temperature, keys, first_token_id, thresholds)
    return _unpack(top_sort_keys_reference(values, num, first_token_id=first_token_id), first_token_id)


def _unpack(sort_keys: Tensor, first_token_id: int) -> tuple[Tensor, Tensor]:
    values, token_ids = unpack_sort_key(sort_keys)
    return values, torch.where(values > -torch.inf, token_ids, first_token_id)
