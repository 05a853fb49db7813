"""Layer-parallel drafting with ranks as threads: every way to divide the layers computes the definition's bits."""

from pathlib import Path

import pytest
import torch

from tests.helpers.layer_parallel import CONFIGS, Case, Outcome, reference, run_case, write_deep_model
from tests.helpers.thread_group import run_ranks
from workers.groups import SoloGroup
from workers.models.layer_groups import MLPs, Weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: write_deep_model(base / name, name) for name in CONFIGS}


def outcomes(case: Case) -> list[Outcome]:
    """Of each rank."""
    if case.num_ranks == 1:
        return [run_case(SoloGroup(), case)]
    return run_ranks(case.num_ranks, lambda group: run_case(group, case))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lp_size", [1, 2, 3, 4])
def test_a_batch_of_layers_computes_the_definition(folders: dict[str, Path], name: str, lp_size: int) -> None:
    case = Case(folder=folders[name], lp_size=lp_size, num_ranks=1)
    (outcome,) = outcomes(case)
    for step, (hidden, expected) in enumerate(zip(outcome.hidden, reference(case), strict=True)):
        assert torch.equal(hidden, expected), f"forward {step}"


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "qwen2-window"])
@pytest.mark.parametrize("lp_size", [2, 3, 4])
def test_ranks_compute_the_definition(folders: dict[str, Path], name: str, lp_size: int, weights: Weights) -> None:
    case = Case(folder=folders[name], lp_size=lp_size, num_ranks=lp_size, weights=weights)
    expected = reference(case)
    for rank, outcome in enumerate(outcomes(case)):
        for step, (hidden, row) in enumerate(zip(outcome.hidden, expected, strict=True)):
            assert torch.equal(hidden, row), f"rank {rank}, forward {step}"
