"""The RoPE settings of a model as data: which scaling, with which numbers. workers/layers/rope.py computes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Unscaled rotary embedding; what derives from it scales it."""

    theta: float

    @property
    def attention_factor(self) -> float:
        """Multiplies cosine and sine."""
        return 1.0

    def max_len(self, max_position_embeddings: int) -> int:
        """Longest seq that the model is meant for, given the config's max_position_embeddings."""
        return max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope(Rope):
    """Positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def max_len(self, max_position_embeddings: int) -> int:
        return int(max_position_embeddings * self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicRope(Rope):
    """NTK scaling that depends on the length of the text. Up to the original length it is the default; beyond it, keys
    that are cached already would need other angles than keys to come, so such lengths are not supported."""

    original_max_position_embeddings: int

    def max_len(self, max_position_embeddings: int) -> int:
        return min(max_position_embeddings, self.original_max_position_embeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope(Rope):
    """Long wavelengths are divided by `factor`, short ones kept, those between blended (arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope(Rope):
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

    def max_len(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))


def yarn_magnitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Attention factor of YaRN where the config gives none; `mscale` and `mscale_all_dim` count only together."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
