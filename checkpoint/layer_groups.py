"""Groups of a draft's layers whose attention runs at once (arXiv 2502.02493): which are valid."""

from collections.abc import Sequence
from dataclasses import dataclass

LayerGroups = tuple[tuple[int, ...], ...]  # every layer once, in order; attention within a group runs at once


@dataclass(frozen=True, slots=True)
class GroupProblem:
    index: int | None  # of the first wrong group; None where they are right, but do not name every layer
    message: str
    remedy: str

    @property
    def path(self) -> str:
        """Where it stands in a deployment file."""
        return "draft.layer_groups" if self.index is None else f"draft.layer_groups.{self.index}"


def layer_groups_problem(groups: Sequence[Sequence[int]], *, num_layers: int, size: int) -> GroupProblem | None:
    """The first thing wrong with groups that should name all layers once and in order, at most `size` in each."""
    remedy = f"name the layers 0 to {num_layers - 1} once and in order, or use auto"
    due = 0
    for index, group in enumerate(groups):
        if not 1 <= len(group) <= size:
            message = f"has {len(group)} layers, a group has 1 to {size} (draft.layer_parallel_size)"
            return GroupProblem(index, message, "split it or raise draft.layer_parallel_size")
        for layer in group:
            if layer != due:
                return GroupProblem(index, f"names layer {layer} where layer {due} is due", remedy)
            due += 1
    if due != num_layers:
        return GroupProblem(None, f"names {due} layers, the draft has {num_layers}", remedy)
    return None
