"""Rotary position embedding (arXiv 2104.09864) and its scalings, with the frequencies that transformers computes."""

import math

import torch
from torch import Tensor

from checkpoint.rope import LinearRope, Llama3Rope, Rope, YarnRope


def cos_sin_cache(rope: Rope, *, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Row p holds the cosines, then the sines of position p: fp32 [num_positions, head_dim].

    They are computed on the host in the table itself: with a million positions a copy would take half a GiB.
    """
    table = torch.empty(num_positions, head_dim)
    cosines, sines = table.chunk(2, dim=1)
    positions = torch.arange(num_positions, dtype=torch.float32)
    torch.outer(positions, _inv_freq(rope, head_dim), out=sines)  # angles, for now
    torch.cos(sines, out=cosines)
    sines.sin_()
    return table.mul_(rope.attention_factor).to(device)


def _inv_freq(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair of a head's dimensions: fp32 [head_dim / 2]."""
    powers = torch.pow(rope.theta, torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope:
        case LinearRope():
            return 1.0 / powers / rope.factor
        case Llama3Rope():
            return _llama3(rope, 1.0 / powers)
        case YarnRope():
            return _yarn(rope, powers, head_dim)
    return 1.0 / powers  # also for DynamicRope, which does not scale within the original length


def _llama3(rope: Llama3Rope, inv_freq: Tensor) -> Tensor:
    turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)  # within the original length
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(rope: YarnRope, powers: Tensor, head_dim: int) -> Tensor:
    low, high = _yarn_ramp_range(rope, head_dim)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0.0, 1.0)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_ramp_range(rope: YarnRope, head_dim: int) -> tuple[float, float]:
    def dim_with_turns(num_turns: float) -> float:
        """The (fractional) pair that turns `num_turns` times within the original length."""
        ratio = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dim_with_turns(rope.beta_fast), dim_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001  # keeps the ramp's slope finite
