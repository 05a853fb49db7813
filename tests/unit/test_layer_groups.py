"""Which layers attend at once: what a user may ask for, and what is chosen by similarity."""

import random
from pathlib import Path

import pytest
import torch

from checkpoint.errors import LoadError
from checkpoint.layer_parallel import LayerGroups
from workers.models.layer_groups import (
    LayerParallelPlan,
    MLPs,
    Weights,
    check_groups,
    choose_groups,
    one_by_one,
)
from workers.models.layer_similarity import layer_input_similarity

DEMO_DRAFT = Path(__file__).parents[2] / "models" / "demo-draft"


def plan(groups: LayerGroups, num_ranks: int) -> LayerParallelPlan:
    return LayerParallelPlan(
        groups=groups, lp_size=num_ranks, num_ranks=num_ranks, weights=Weights.SHARDED, mlps=MLPs.REPLICATED
    )


def test_good_groups_are_taken_as_they_are() -> None:
    groups = ((0,), (1, 2, 3), (4, 5), (6,))
    assert check_groups([list(group) for group in groups], num_layers=7, lp_size=3) == groups


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0], [], [1, 2, 3]], r"layer_groups\.1: \[\]: has 0 layers, a group has 1 to 2"),
        ([[0, 1, 2], [3]], r"layer_groups\.0: \[0, 1, 2\]: has 3 layers, a group has 1 to 2"),
        ([[0], [1, 3], [2]], r"layer_groups\.1: \[1, 3\]: names layer 3 where layer 2 is due"),
        ([[0], [1, 1], [2, 3]], r"layer 1 where layer 2 is due"),
        ([[1, 0], [2, 3]], r"layer 1 where layer 0 is due"),
        ([[0], [1, 2]], r"names 3 layers, the draft has 4"),
        ([[0], [1, 2], [3, 4]], r"names 5 layers, the draft has 4"),
    ],
)
def test_bad_groups_are_refused_with_the_reason(groups: list[list[int]], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        check_groups(groups, num_layers=4, lp_size=2)


def test_a_full_group_has_one_layer_for_each_rank_in_order() -> None:
    owners = plan(((0,), (1, 2, 3), (4, 5, 6), (7, 8), (9,)), 3).owners()
    assert owners[1:4] == owners[4:7] == (0, 1, 2)


def test_layers_of_a_group_have_different_owners_who_hold_equally_many() -> None:
    rng = random.Random(0)
    for _ in range(200):
        num_ranks = rng.randint(1, 5)
        groups, layer = [], 0
        for _ in range(rng.randint(num_ranks, 12)):
            size = rng.randint(1, num_ranks)
            groups.append(tuple(range(layer, layer + size)))
            layer += size
        owners = plan(tuple(groups), num_ranks).owners()
        loads = [owners.count(rank) for rank in range(num_ranks)]
        assert len(owners) == layer
        assert max(loads) - min(loads) <= 1
        assert all(len({owners[i] for i in group}) == len(group) for group in groups)


def similar(num_layers: int, **at: float) -> list[list[float]]:
    """A similarity matrix: neighbouring layers differ by 0.01, or by what `at` says for the step to a layer
    ("layer5")."""
    steps = [at.get(f"layer{layer}", 0.01) for layer in range(num_layers)]
    return [[1 - sum(steps[min(a, b) + 1 : max(a, b) + 1]) for b in range(num_layers)] for a in range(num_layers)]


def test_first_and_last_layer_stand_alone_and_the_others_are_grouped() -> None:
    assert choose_groups(similar(10), lp_size=4, least_similarity=0.5) == ((0,), (1, 2, 3, 4), (5, 6, 7, 8), (9,))
    assert choose_groups(similar(10), lp_size=1, least_similarity=0.5) == one_by_one(10)
    assert choose_groups(similar(2), lp_size=4, least_similarity=0.5) == ((0,), (1,))
    assert choose_groups(similar(1), lp_size=4, least_similarity=0.5) == ((0,),)


def test_no_group_spans_a_break() -> None:
    groups = choose_groups(similar(10, layer4=0.6), lp_size=4, least_similarity=0.5)
    assert groups[1] == (1, 2, 3)
    assert [len(group) for group in groups[2:-1]] in ([3, 2], [2, 3], [4, 1], [1, 4])


def test_groups_are_split_where_layers_differ_most() -> None:
    """Any division needs two groups."""
    assert choose_groups(similar(8, layer3=0.2), lp_size=4, least_similarity=0.5) == ((0,), (1, 2), (3, 4, 5, 6), (7,))
    assert choose_groups(similar(8, layer5=0.2), lp_size=4, least_similarity=0.5) == ((0,), (1, 2, 3, 4), (5, 6), (7,))


def test_neighbouring_layers_of_a_trained_draft_see_similar_inputs() -> None:
    steps: list[tuple[int, int]] = []
    similarity = layer_input_similarity(
        DEMO_DRAFT,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=128,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert len(similarity) == 8
    assert all(similarity[layer][layer] == pytest.approx(1, abs=1e-4) for layer in range(8))
    assert all(similarity[layer][layer + 1] > 0.9 for layer in range(1, 7))
    assert all(similarity[1][layer] > similarity[1][layer + 1] for layer in range(1, 7))
    assert steps == [(layer, 8) for layer in range(8)]


def test_without_a_tokenizer_groups_must_be_named(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO_DRAFT / name)
    with pytest.raises(LoadError, match=r"no tokenizer\.json.*name the groups"):
        layer_input_similarity(
            tmp_path,
            dtype=torch.float32,
            device=torch.device("cpu"),
            max_model_len=64,
            progress=lambda done, total: None,
        )
