"""A draft whose attention layers run side by side: what may be asked for and what does not go together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import Problem
from cluster.model_folder import DTYPE_BYTES, ModelFolder

LayerGroups = tuple[tuple[int, ...], ...]
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
            tensor.num_elements * _share_of(tensor.name, attention=attention, mlps=mlps, head=share)
            for tensor in folder.held_tensors
        )
        return int(num_elements) * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, folder: ModelFolder, dtype: str) -> int:
        """Bytes on the rank that holds most layers."""
        whole = folder.kv_bytes_per_token(1, dtype)
        if self.weights == "replicated":
            return whole
        return whole // folder.num_layers * -(-folder.num_layers // self.num_ranks)


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


def layer_parallel_problems(
    size: int, folder: ModelFolder, *, tp_size: int, groups: Sequence[Sequence[int]] | None, mlps: Mlps
) -> Iterator[Problem]:
    """What of these keys of the draft section does not fit together or the model."""
    if size == 1:
        if groups is not None:
            remedy = "set draft.layer_parallel_size, or leave it out"
            yield Problem(path="draft.layer_groups", message="needs a draft.layer_parallel_size over 1", remedy=remedy)
        return
    if tp_size > 1:
        message = f"does not go together with draft.tensor_parallel_size {tp_size}"
        yield Problem(path="draft.layer_parallel_size", value=str(size), message=message, remedy="set one of them to 1")
    if size > folder.num_layers:
        message = f"is more than the draft's {folder.num_layers} layers"
        remedy = f"use at most {folder.num_layers}"
        yield Problem(path="draft.layer_parallel_size", value=str(size), message=message, remedy=remedy)
    if mlps == "tensor_parallel" and folder.intermediate_size % size:
        message = f"layer_parallel_size {size} does not divide the draft's intermediate size {folder.intermediate_size}"
        remedy = "use replicated or auto"
        yield Problem(path="draft.layer_parallel_mlp", value=f"'{mlps}'", message=message, remedy=remedy)
    if groups is not None:
        yield from _group_problems(size, folder.num_layers, groups)


def _group_problems(size: int, num_layers: int, groups: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """The first group that is wrong: those behind it would only repeat it."""
    due = 0
    remedy = f"name the layers 0 to {num_layers - 1} once and in order, or use auto"
    for index, group in enumerate(groups):
        path, shown = f"draft.layer_groups.{index}", str(list(group))
        if not 1 <= len(group) <= size:
            message = f"has {len(group)} layers, a group has 1 to {size} (draft.layer_parallel_size)"
            yield Problem(path=path, value=shown, message=message, remedy="split it or raise draft.layer_parallel_size")
            return
        for layer in group:
            if layer != due:
                message = f"names layer {layer} where layer {due} is due"
                yield Problem(path=path, value=shown, message=message, remedy=remedy)
                return
            due += 1
    if due != num_layers:
        message = f"names {due} layers, the draft has {num_layers}"
        yield Problem(path="draft.layer_groups", message=message, remedy=remedy)
