"""Collectives over gloo: correct for every dtype that layers and sampling send, and ordered where order matters."""

from pathlib import Path

import pytest
import torch

from tests.helpers.lonely_rank import wait_alone
from tests.helpers.ranks import run_on_ranks, start_ranks
from tests.helpers.tp_worker import Collectives, collectives

SIZE = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Collectives]:
    return run_on_ranks(collectives, SIZE, tmp_path_factory.mktemp("collectives"))


def test_each_rank_gets_the_documented_result(ranks: list[Collectives]) -> None:
    parts = torch.stack([torch.arange(6).view(2, 3) + 10 * rank for rank in range(SIZE)])
    expected = {"sum": parts.sum(dim=0), "gather": parts, "broadcast": parts[1]}
    for rank in ranks:
        for name, value in rank.by_name.items():
            operation = name.removeprefix("ordered ").split()[0]
            assert value.tolist() == expected[operation].tolist(), name
            assert str(value.dtype) == name.split()[-1]


def test_an_ordered_sum_does_not_depend_on_other_rows(ranks: list[Collectives]) -> None:
    for rank in ranks:
        assert torch.equal(rank.sum_together, rank.sum_alone)
        assert torch.equal(rank.sum_together, ranks[0].sum_together)


def test_a_collective_fails_after_the_time_in_the_spec(tmp_path: Path) -> None:
    """It does not wait for torch's half an hour."""
    start_ranks(wait_alone, 2, tmp_path)
