"""A draft whose attention layers run side by side: what may be asked for and what does not go together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from checkpoint.config import ModelConfig
from checkpoint.folder import DTYPE_BYTES, ModelFolder
from checkpoint.layer_parallel import (
    LayerGroups,
    layer_groups_problem,
    layer_parallel_problems,
    tensor_parallel_too_problem,
)
from cluster.errors import Problem

Weights = Literal["replicated", "sharded"]
Mlps = Literal["auto", "replicated", "tensor_parallel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParallel:
    """Attention of up to `size` consecutive layers at once (arXiv 2502.02493)."""

    size: int
    num_ranks: int  # `size`, or 1: one batched pass on one device
    groups: LayerGroups | None = None  # None: chosen at load
    weights: Weights = "replicated"
    mlps: Mlps = "auto"

    def weight_bytes(self, folder: ModelFolder, dtype: str) -> int:
        """Bytes on one rank; where MLPs are still to be chosen, with whole ones."""
        share = 1.0 / self.num_ranks
        attention = share if self.weights == "sharded" else 1.0
        mlps = share if self.mlps == "tensor_parallel" else 1.0
        num_elements = sum(
            tensor.num_elements * _share_of(name, attention=attention, mlps=mlps, head=share)
            for name, tensor in folder.weights.items()
        )
        return int(num_elements) * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, folder: ModelFolder, dtype: str) -> int:
        """Bytes on the rank that holds most layers."""
        whole = folder.kv_bytes_per_token(1, dtype)
        if self.weights == "replicated":
            return whole
        return whole // folder.config.num_layers * -(-folder.config.num_layers // self.num_ranks)


def _share_of(name: str, *, attention: float, mlps: float, head: float) -> float:
    if ".self_attn." in name:
        return attention
    if ".mlp." in name:
        return mlps
    return head if name.startswith("lm_head.") else 1.0


def layer_parallel(
    size: int,
    *,
    target_tp_size: int,
    colocated: bool,
    groups: Sequence[Sequence[int]] | None = None,
    weights: Weights = "replicated",
    mlps: Mlps = "auto",
) -> LayerParallel | None:
    """None for a size of 1. A colocated draft takes the target's ranks if they are as many, else the first alone."""
    if size == 1:
        return None
    fits = not colocated or size <= target_tp_size
    return LayerParallel(
        size=size,
        num_ranks=size if fits else 1,
        groups=None if groups is None else tuple(tuple(group) for group in groups),
        weights=weights if fits else "replicated",
        mlps=mlps if fits else "replicated",
    )


def layer_parallel_key_problems(
    size: int, config: ModelConfig, *, tp_size: int, groups: Sequence[Sequence[int]] | None, mlps: Mlps
) -> Iterator[Problem]:
    """What of these keys of the draft section does not fit together or the model."""
    if size == 1:
        if groups is not None:
            remedy = "set draft.layer_parallel_size, or leave it out"
            yield Problem(path="draft.layer_groups", message="needs a draft.layer_parallel_size over 1", remedy=remedy)
        return
    found = [tensor_parallel_too_problem(size, tp_size=tp_size)]
    found += layer_parallel_problems(config, size=size, splits_mlps=mlps == "tensor_parallel")
    if groups is not None:
        found.append(layer_groups_problem(groups, num_layers=config.num_layers, size=size))
    for wrong in found:
        if wrong is not None:
            yield Problem(path=wrong.path, value=wrong.value, message=wrong.message, remedy=wrong.remedy)
