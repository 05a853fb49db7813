"""A draft whose attention layers run side by side: what may be asked for and what does not go together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from checkpoint.config import ModelConfig
from checkpoint.folder import ModelFolder
from checkpoint.layer_parallel import (
    LayerGroups,
    layer_groups_problem,
    layer_parallel_problems,
    tensor_parallel_too_problem,
)
from checkpoint.tensors import TensorInfo
from checkpoint.weights import EMBEDDING, HEAD
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

    def weight_bytes(self, folder: ModelFolder) -> int:
        """Bytes on the fullest rank. If the split of MLPs is still to be chosen, MLPs count whole."""
        most_layers = self.most_layers(folder)
        elements = {name: self._elements(name, tensor, most_layers) for name, tensor in folder.weights.items()}
        return sum(folder.bytes_of(name, num_elements) for name, num_elements in elements.items())

    def most_layers(self, folder: ModelFolder) -> int:
        """Whose attention the fullest rank holds."""
        num_layers = folder.config.num_layers
        return num_layers if self.weights == "replicated" else -(-num_layers // self.num_ranks)

    def _elements(self, name: str, tensor: TensorInfo, most_layers: int) -> int:
        if name == HEAD or (name == EMBEDDING and self.weights == "sharded"):
            return tensor.elements_of_rows(self.num_ranks)
        if ".self_attn." in name or ".input_layernorm." in name:
            layer = int(name.split(".")[2])
            return tensor.num_elements if layer < most_layers else 0  # as if the rank held the first ones
        if ".mlp." in name and self.mlps == "tensor_parallel" and not name.endswith("down_proj.bias"):
            return tensor.num_elements // self.num_ranks
        return tensor.num_elements

    def kv_bytes_per_token(self, folder: ModelFolder) -> int:
        """Bytes on the rank that holds most layers."""
        return folder.kv_bytes_per_token(1) // folder.config.num_layers * self.most_layers(folder)


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
    """What is wrong with these keys of the draft section, with each other or with the model."""
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
