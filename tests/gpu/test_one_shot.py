"""One-shot sums between two GPUs; needs two."""

from pathlib import Path

import pytest
import torch

from tests.helpers.one_shot_rank import sum_on_a_gpu
from tests.helpers.ranks import start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_one_shot_sums_are_used_and_right_in_graphs_too(tmp_path: Path) -> None:
    start_ranks(sum_on_a_gpu, 2, tmp_path)
