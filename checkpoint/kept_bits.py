"""Matrices that keep the few bits in which a checkpoint stores them: what they take, and which models can.

Products with them need integer codes, and a scale for each output and group of neighbouring inputs.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from checkpoint.config import ModelConfig
from checkpoint.stored_format import StoredFormat
from checkpoint.stored_matrices import StoredMatrix
from checkpoint.tensors import TensorInfo

_GROUP_STEP: Final = 32  # inputs; kernels/native/quantized.py
_SCALE_BYTES: Final = 4
_FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one product computes them


def kept_bytes(matrix: StoredMatrix, num_elements: int) -> int:
    """Memory of so many elements of a matrix, with their scales and zero points."""
    format = matrix.format
    num_groups = -(-num_elements // (format.block[1] or matrix.shape[1]))
    return num_elements * format.num_bits // 8 + num_groups * _SCALE_BYTES * (2 if format.has_zero_points else 1)


def kept_bits_problem(config: ModelConfig, weights: Mapping[str, TensorInfo], *, num_ranks: int) -> str | None:
    """Why a model cannot keep the bits of its checkpoint, with its matrices split among so many ranks, or None."""
    format = config.stored_as
    if format is None:
        return "the checkpoint is not quantised"
    return _format_problem(format) or _split_problem(config, format, num_ranks) or _mixed_problem(weights)


def _format_problem(format: StoredFormat) -> str | None:
    if format.is_float:
        return "its codes are FP8, and only integers have products"
    if format.reorders_inputs:
        return "its groups are ordered by activation (desc_act)"
    if format.block[1] % _GROUP_STEP:
        return f"its groups have {format.block[1]} inputs, no multiple of {_GROUP_STEP}"
    return None


def _split_problem(config: ModelConfig, format: StoredFormat, num_ranks: int) -> str | None:
    """Projections that ranks split by inputs must be cut between groups."""
    group = format.block[1]
    sizes = {"attention features": config.num_q_heads * config.head_dim, "intermediate size": config.intermediate_size}
    for name, size in sizes.items():
        if group and num_ranks > 1 and size // num_ranks % group:
            return f"its groups have {group} inputs, and the model's {name} on a rank is {size // num_ranks}"
    return None


def _mixed_problem(weights: Mapping[str, TensorInfo]) -> str | None:
    for name, other in _fused_pairs(weights):
        if isinstance(weights[name], StoredMatrix) != isinstance(weights[other], StoredMatrix):
            return f"one product computes {name} and {other}, and only one of them is quantised"
    return None


def _fused_pairs(weights: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    for first, *others in _FUSED:
        for name in weights:
            if name.endswith(f"{first}.weight"):
                yield from ((name, name.replace(first, other)) for other in others)
