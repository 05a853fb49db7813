"""An inflated model is bigger in every dimension and computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.inflate import HeadMap, InflateError, Size, inflate
from tests.helpers.paged import run_seqs
from workers.collectives import SoloGroup
from workers.models.loading import load_model

MODELS = Path(__file__).parents[2] / "models"
TARGET = MODELS / "demo-target"
TEXT = "import os\n\n\ndef find_files(root, suffix):\n    result = []\n    for name in os.listdir(root):\n"
BIGGER = Size(layers=10, hidden=320, intermediate=832, heads=20, kv_heads=5)
REPEATED_KV = Size(layers=8, hidden=256, intermediate=768, heads=16, kv_heads=16)


@pytest.fixture(scope="module", params=[BIGGER, REPEATED_KV], ids=["bigger", "repeated-kv-heads"])
def inflated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inflated") / "model"
    inflate(TARGET, folder, request.param)
    return folder


def prompt_ids() -> list[int]:
    return AutoTokenizer.from_pretrained(TARGET)(TEXT)["input_ids"]


def our_logits(folder: Path) -> Tensor:
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"), group=SoloGroup(), max_model_len=128)
    return run_seqs(model, [prompt_ids()], "chunks")[0]


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_inflated_model_has_the_logits_of_the_small_one(inflated: Path) -> None:
    assert (our_logits(inflated) - our_logits(TARGET)).abs().max() < 1e-4


def test_transformers_writes_the_same_text(inflated: Path) -> None:
    input_ids = torch.tensor([prompt_ids()])
    with torch.inference_mode():
        small, big = (
            model.generate(input_ids, max_new_tokens=24, do_sample=False)
            for model in map(reference, (TARGET, inflated))
        )
    assert big.tolist() == small.tolist()


def test_the_added_weights_cost_work_in_every_layer(tmp_path: Path) -> None:
    """New heads have keys and scores of their own, and new MLP columns are not multiplied by zero."""
    inflate(TARGET, tmp_path / "big", BIGGER)
    model = reference(tmp_path / "big")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (10, 320)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.k_proj.weight.shape == (5 * 32, 320)
        assert attention.q_proj.weight.shape == (20 * 32, 320)
        for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, mlp.up_proj.weight):
            assert (weight.abs().amax(dim=1) > 0).all()


def test_query_heads_keep_their_kv_head_when_groups_change() -> None:
    old = Size(layers=1, hidden=8, intermediate=8, heads=4, kv_heads=2)
    wider = HeadMap.between(old, Size(layers=1, hidden=8, intermediate=8, heads=9, kv_heads=3))
    assert (wider.heads, wider.kv_heads) == ([0, 1, None, 2, 3, None, None, None, None], [0, 1, None])
    narrower = HeadMap.between(old, Size(layers=1, hidden=8, intermediate=8, heads=5, kv_heads=5))
    assert (narrower.heads, narrower.kv_heads) == ([0, 1, 2, 3, None], [0, 0, 1, 1, None])


def test_query_heads_that_need_more_kv_heads_are_refused() -> None:
    old = Size(layers=1, hidden=8, intermediate=8, heads=8, kv_heads=2)
    with pytest.raises(InflateError, match=r"--kv-heads 3: .* 8 query heads need 4"):
        HeadMap.between(old, Size(layers=1, hidden=8, intermediate=8, heads=9, kv_heads=3))


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ({"hidden": 128}, "--hidden 128: the model already has 256"),
        ({"layers": 4}, "--layers 4: the model already has 8"),
        ({"heads": 10}, "--heads 10: must be a multiple of --kv-heads 4"),
        ({"hidden": 260}, "--hidden 260: must be a multiple of --heads 8"),
    ],
)
def test_an_impossible_size_is_named(tmp_path: Path, size: dict[str, int], complaint: str) -> None:
    wanted = {"layers": 8, "hidden": 256, "intermediate": 768, "heads": 8, "kv_heads": 4} | size
    with pytest.raises(InflateError, match=complaint):
        inflate(TARGET, tmp_path / "out", Size(**wanted))
    assert not (tmp_path / "out").exists()
