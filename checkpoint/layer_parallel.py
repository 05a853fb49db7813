"""Drafts whose attention layers run side by side (arXiv 2502.02493): which sizes and groups fit a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from checkpoint.config import ModelConfig

LayerGroups = tuple[tuple[int, ...], ...]  # every layer once, in order; attention within a group runs at once


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParallelProblem:
    """What is wrong with one key of a draft, in the words of a deployment file."""

    path: str  # of the key: "draft.layer_groups.2"
    value: str | None  # what it says; None where nothing in particular is wrong
    message: str
    remedy: str

    @property
    def finding(self) -> str:
        """All but the remedy."""
        where = self.path if self.value is None else f"{self.path}: {self.value}"
        return f"{where}: {self.message}"


def tensor_parallel_too_problem(size: int, *, tp_size: int) -> LayerParallelProblem | None:
    """A draft is cut by layers or by tensors, not both."""
    if size == 1 or tp_size == 1:
        return None
    message = f"does not go together with draft.tensor_parallel_size {tp_size}"
    return _size_problem(size, message, "set one of them to 1")


def layer_parallel_problems(config: ModelConfig, *, size: int, splits_mlps: bool) -> Iterator[LayerParallelProblem]:
    """Why `size` ranks cannot share the layers, the vocabulary or (splits_mlps) each MLP."""
    if size > config.num_layers:
        yield _size_problem(size, f"is more than the draft's {config.num_layers} layers", _at_most(config))
    elif size > config.vocab_size:
        yield _size_problem(size, f"is more than the draft's vocabulary of {config.vocab_size}", _at_most(config))
    if splits_mlps and config.intermediate_size % size:
        message = f"layer_parallel_size {size} does not divide the draft's intermediate size {config.intermediate_size}"
        yield LayerParallelProblem(
            path="draft.layer_parallel_mlp",
            value="'tensor_parallel'",
            message=message,
            remedy="use replicated or auto",
        )


def layer_groups_problem(groups: Sequence[Sequence[int]], *, num_layers: int, size: int) -> LayerParallelProblem | None:
    """The first thing wrong with groups that should name all layers once and in order, at most `size` in each."""
    remedy = f"name the layers 0 to {num_layers - 1} once and in order, or use auto"
    due = 0
    for index, group in enumerate(groups):
        path, value = f"draft.layer_groups.{index}", str(list(group))
        if not 1 <= len(group) <= size:
            message = f"has {len(group)} layers, a group has 1 to {size} (draft.layer_parallel_size)"
            split = "split it or raise draft.layer_parallel_size"
            return LayerParallelProblem(path=path, value=value, message=message, remedy=split)
        for layer in group:
            if layer != due:
                message = f"names layer {layer} where layer {due} is due"
                return LayerParallelProblem(path=path, value=value, message=message, remedy=remedy)
            due += 1
    if due != num_layers:
        message = f"names {due} layers, the draft has {num_layers}"
        return LayerParallelProblem(path="draft.layer_groups", value=None, message=message, remedy=remedy)
    return None


def _size_problem(size: int, message: str, remedy: str) -> LayerParallelProblem:
    return LayerParallelProblem(path="draft.layer_parallel_size", value=str(size), message=message, remedy=remedy)


def _at_most(config: ModelConfig) -> str:
    return f"use at most {min(config.num_layers, config.vocab_size)}"
