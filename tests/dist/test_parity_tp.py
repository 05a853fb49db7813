"""Tensor-parallel ranks together compute what transformers computes alone."""

from pathlib import Path

import pytest
import torch

from tests.helpers.paged import FEEDS
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_models import FAMILIES, MAX_MODEL_LEN, TinyModel, make_tiny_model
from tests.helpers.tp_worker import Case, shard_logits

TOLERANCE = 1e-4  # fp32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    return {family: make_tiny_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("tp_size", [2, 4])
def test_logits_equal_transformers(tiny: dict[str, TinyModel], tmp_path: Path, tp_size: int) -> None:
    cases = {
        family: Case(folder=model.folder, token_ids=model.token_ids, max_model_len=MAX_MODEL_LEN, feeds=tuple(FEEDS))
        for family, model in tiny.items()
    }
    ranks = run_on_ranks(shard_logits, tp_size, tmp_path, cases)
    for family, model in tiny.items():
        for feed in FEEDS:
            for seq, expected in enumerate(model.logits):
                logits = torch.cat([rank[family][feed][seq] for rank in ranks], dim=-1)
                assert logits.shape == expected.shape
                worst = (logits - expected).abs().max().item()
                assert worst < TOLERANCE, f"{family}, {feed}, seq {seq}: logits off by {worst}"
        file_bytes = (model.folder / "model.safetensors").stat().st_size
        for rank in ranks:
            assert rank[family]["weight_bytes"][0] < file_bytes * 0.75, f"{family}: a rank holds most of the model"
