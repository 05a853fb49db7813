"""Which layers of a draft attend at once, and which rank computes each of them (arXiv 2502.02493)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from checkpoint.errors import LoadError
from checkpoint.layer_parallel import LayerGroups, layer_groups_problem


class Weights(StrEnum):
    """Which ranks hold attention weights and KV."""

    REPLICATED = "replicated"  # every rank holds all layers
    SHARDED = "sharded"  # a rank holds the layers that it owns


class MLPs(StrEnum):
    """How a rank takes part in an MLP."""

    REPLICATED = "replicated"  # every rank computes all of it
    TENSOR_PARALLEL = "tensor_parallel"  # each rank computes a slice


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParallelPlan:
    """How the ranks of a draft divide its layers; the same on all of them."""

    groups: LayerGroups
    lp_size: int
    num_ranks: int  # lp_size, or 1: the layers of a group run as one batch
    weights: Weights
    mlps: MLPs

    def __post_init__(self) -> None:
        assert self.num_ranks in (1, self.lp_size), f"{self.num_ranks} ranks cannot run {self.lp_size} layers at once"

    @property
    def is_approximate(self) -> bool:
        return any(len(group) > 1 for group in self.groups)

    def owners(self) -> tuple[int, ...]:
        """The rank of each layer. A full group has one layer for each rank, in order. A shorter group goes to the ranks
        with the fewest layers so far, so that sharded KV caches have equal size."""
        owners: list[int] = []
        loads = [0] * self.num_ranks
        for group in self.groups:
            ranks = sorted(sorted(range(self.num_ranks), key=lambda rank: loads[rank])[: len(group)])
            for rank in ranks if self.num_ranks > 1 else [0] * len(group):
                loads[rank] += 1
                owners.append(rank)
        return tuple(owners)


def one_by_one(num_layers: int) -> LayerGroups:
    """The exact model."""
    return tuple((layer,) for layer in range(num_layers))


def check_groups(groups: Sequence[Sequence[int]], *, num_layers: int, lp_size: int) -> LayerGroups:
    """The groups, if they name every layer once and in order and each has 1 to lp_size layers.

    Raises:
        LoadError: They do not; names the first wrong group.
    """
    problem = layer_groups_problem(groups, num_layers=num_layers, size=lp_size)
    if problem is not None:
        raise LoadError(problem.finding, problem.remedy)
    return tuple(tuple(group) for group in groups)


def choose_groups(similarity: Sequence[Sequence[float]], *, lp_size: int, least_similarity: float) -> LayerGroups:
    """As few groups as possible, of at most lp_size layers each, whose layers see an input similar to their own. Of
    several such choices, the one with the greatest similarity. The first and the last layer stand alone.

    Args:
        similarity: [num_layers][num_layers], of the inputs of two layers; the second is not before the first.
        least_similarity: minimum between the input of a group and that of each of its layers.
    """
    num_layers = len(similarity)
    if num_layers < 3:
        return one_by_one(num_layers)
    last = num_layers - 1
    # By the layer at which the next group begins: number of groups, dissimilarity, start of the last group.
    best: dict[int, tuple[int, float, int]] = {1: (0, 0.0, 1)}
    for start in range(1, last):
        num_groups, loss, _ = best[start]
        for end in range(start + 1, min(start + lp_size, last) + 1):
            inside = [similarity[start][layer] for layer in range(start, end)]
            if min(inside[1:], default=1.0) < least_similarity:
                break
            candidate = (num_groups + 1, loss + sum(1 - value for value in inside), start)
            best[end] = min(best.get(end, candidate), candidate)
    groups: list[tuple[int, ...]] = [(last,)]
    end = last
    while end > 1:
        start = best[end][2]
        groups.append(tuple(range(start, end)))
        end = start
    return ((0,), *reversed(groups))
