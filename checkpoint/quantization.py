"""Weights that are rounded to few bits when they are loaded: the formats, what they take, and which models they fit.

`kernels/layers/quantized.py` holds the numbers.
"""

from dataclasses import dataclass
from typing import Literal

from checkpoint.config import ModelConfig

WeightFormat = Literal["int8", "int4", "mxfp4"]
_CODE_BITS = {"int8": 8, "int4": 4, "mxfp4": 4}
_INT4_GROUP_SIZE, _MXFP4_GROUP_SIZE = 128, 32  # inputs that share a scale; in int8 all do
_SCALE_BYTES = 4
_MXFP4_CUDA_SCALE_BYTES = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the matrices of a model are rounded. The embedding, norms and biases keep the model's dtype."""

    format: WeightFormat
    device: Literal["cpu", "cuda"]

    @property
    def head_format(self) -> WeightFormat:
        """The head decides the tokens, so it is rounded less where there is a product for that."""
        return head_format(self.format)

    def num_bytes(self, num_elements: int, *, in_features: int, is_head: bool) -> int:
        """Memory of so many elements of a matrix, with their scales."""
        rounded = self.head_format if is_head else self.format
        scale_bytes = _MXFP4_CUDA_SCALE_BYTES if (rounded, self.device) == ("mxfp4", "cuda") else _SCALE_BYTES
        groups = {"int8": in_features, "int4": _INT4_GROUP_SIZE, "mxfp4": _MXFP4_GROUP_SIZE}
        return num_elements * _CODE_BITS[rounded] // 8 + num_elements * scale_bytes // groups[rounded]

    def problem(self, config: ModelConfig, *, num_ranks: int, splits_mlps: bool, splits_heads: bool) -> str | None:
        """Why a model cannot be rounded so, or None."""
        if self.format != "mxfp4":
            return None
        sizes = {
            "hidden size": config.hidden_size,
            "attention features on a rank": config.num_q_heads * config.head_dim // (num_ranks if splits_heads else 1),
            "intermediate size on a rank": config.intermediate_size // (num_ranks if splits_mlps else 1),
        }
        for name, size in sizes.items():
            if size % _MXFP4_GROUP_SIZE:
                return f"needs multiples of {_MXFP4_GROUP_SIZE} inputs, and the model's {name} is {size}"
        return None


def head_format(format: WeightFormat) -> WeightFormat:
    """Of a model's head, if its other matrices have `format`."""
    return "mxfp4" if format == "mxfp4" else "int8"
