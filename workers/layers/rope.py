"""Rotary position embedding (arXiv 2104.09864) and its scalings, with the frequencies that transformers computes."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rope(Protocol):
    """How far each pair of a head's dimensions turns from one position to the next."""

    def inv_freq(self, head_dim: int) -> Tensor:
        """Radians per position of each pair: fp32 [head_dim / 2]."""
        ...

    @property
    def attention_factor(self) -> float:
        """Multiplies cosine and sine."""
        ...

    def max_len(self, max_position_embeddings: int) -> int:
        """Longest seq that the model is meant for, given the config's max_position_embeddings."""
        ...


def cos_sin_cache(rope: Rope, *, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Row p holds the cosines, then the sines of position p: fp32 [num_positions, head_dim]."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, rope.inv_freq(head_dim))  # [num_positions, head_dim / 2]
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * rope.attention_factor).to(device)


def _powers(theta: float, head_dim: int) -> Tensor:  # fp32 [head_dim / 2]
    return torch.pow(theta, torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultRope:
    theta: float

    def inv_freq(self, head_dim: int) -> Tensor:
        return 1.0 / _powers(self.theta, head_dim)

    @property
    def attention_factor(self) -> float:
        return 1.0

    def max_len(self, max_position_embeddings: int) -> int:
        return max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope(DefaultRope):
    """Positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def inv_freq(self, head_dim: int) -> Tensor:
        return 1.0 / _powers(self.theta, head_dim) / self.factor

    def max_len(self, max_position_embeddings: int) -> int:
        return int(max_position_embeddings * self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope(DefaultRope):
    """NTK scaling that depends on the length of the text. Up to the original length it is the default; beyond it, keys
    that are cached already would need other angles than keys to come, so such lengths are not supported."""

    original_max_position_embeddings: int

    def max_len(self, max_position_embeddings: int) -> int:
        return min(max_position_embeddings, self.original_max_position_embeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope(DefaultRope):
    """Long wavelengths are divided by `factor`, short ones kept, those between blended (arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def inv_freq(self, head_dim: int) -> Tensor:
        inv_freq = 1.0 / _powers(self.theta, head_dim)
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)  # within the original length
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return (1 - keep) * inv_freq / self.factor + keep * inv_freq


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope(DefaultRope):
    """YaRN (arXiv 2309.00071): pairs that turn often keep their frequency, the others are divided by `factor`."""

    factor: float
    original_max_position_embeddings: int
    magnitude: float  # of cosine and sine; see `yarn_magnitude`
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the ramp's ends outwards to whole dimensions

    @property
    def attention_factor(self) -> float:
        return self.magnitude

    def inv_freq(self, head_dim: int) -> Tensor:
        powers = _powers(self.theta, head_dim)
        low, high = self._ramp_range(head_dim)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
        keep = 1 - ramp.clamp(0.0, 1.0)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep

    def _ramp_range(self, head_dim: int) -> tuple[float, float]:
        low = self._dim_with_turns(self.beta_fast, head_dim)
        high = self._dim_with_turns(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high if high != low else high + 0.001  # keeps the ramp's slope finite

    def _dim_with_turns(self, num_turns: float, head_dim: int) -> float:
        """The (fractional) pair that turns `num_turns` times within the original length."""
        ratio = self.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(self.theta))

    def max_len(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))


def yarn_magnitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Attention factor of YaRN where the config gives none; `mscale` and `mscale_all_dim` count only together."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
