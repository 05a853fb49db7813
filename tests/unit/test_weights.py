"""Planner and workers agree on the tensors that a folder must hold and on the files that hold them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.config import ModelConfig
from checkpoint.config_json import parse_config
from checkpoint.errors import LoadError
from checkpoint.folder import ModelFolder, read_model_folder
from checkpoint.tensors import TensorInfo
from checkpoint.weights import expected_tensors, read_weights
from cluster.layer_parallel import LayerParallel
from tests.helpers.model_folders import tensors_of, write_model_folder, write_safetensors
from tests.helpers.tiny_models import FAMILIES
from workers.layers.context import BuildContext
from workers.models.decoder import CausalLM
from workers.models.layer_groups import LayerParallelPlan, MLPs, Weights, one_by_one
from workers.models.layer_parallel_decoder import LayerParallelLM


class StandIn:
    """A rank that only builds layers."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("building calls nobody")

    all_reduce = all_gather

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        raise AssertionError("building calls nobody")


def context(rank: int, size: int) -> BuildContext:
    return BuildContext(StandIn(rank, size), dtype=torch.float32, device=torch.device("meta"), batch_invariant=False)


def config_of(family: str) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    """Our config of a transformers model, and the shapes that the model saves."""
    with torch.device("meta"):
        model = FAMILIES[family]()
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    saved = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        saved.pop("lm_head.weight")
    return parse_config(raw), saved


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_must_hold_the_files_that_transformers_saves(family: str) -> None:
    config, saved = config_of(family)
    assert dict(expected_tensors(config)) == saved


def planned(config: ModelConfig) -> ModelFolder:
    """What the plan knows about a folder with that model, in fp32."""
    weights = {
        name: TensorInfo(file=Path(), shape=shape, dtype="F32", start=0, num_bytes=0)
        for name, shape in expected_tensors(config)
    }
    return ModelFolder(path=Path(), config=config, dtype="float32", eos=(), weights=weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_plan_counts_the_bytes_of_the_fullest_rank(family: str, size: int) -> None:
    config, _ = config_of(family)
    models = [CausalLM(config, max_model_len=8, ctx=context(rank, size)) for rank in range(size)]
    assert planned(config).weight_bytes(size) == max(model.weight_bytes for model in models)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_of_a_decoder_read_exactly_that(family: str, size: int) -> None:
    config, saved = config_of(family)
    for rank in range(size):
        ctx = context(rank, size)
        CausalLM(config, max_model_len=8, ctx=ctx)
        assert {part.name: part.full_shape for part in ctx.slices} == saved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("mlps", MLPs)
def test_the_ranks_of_a_layer_parallel_draft_read_it_together(family: str, weights: Weights, mlps: MLPs) -> None:
    config, saved = config_of(family)
    plan = LayerParallelPlan(groups=one_by_one(config.num_layers), lp_size=2, num_ranks=2, weights=weights, mlps=mlps)
    read: dict[str, Any] = {}
    num_bytes = []
    for rank in range(2):
        ctx = context(rank, 2)
        num_bytes.append(LayerParallelLM(config, plan, max_model_len=8, ctx=ctx).weight_bytes)
        read |= {part.name: part.full_shape for part in ctx.slices}
    assert read == saved
    in_the_plan = LayerParallel(size=2, num_ranks=2, weights=weights.value, mlps=mlps.value)
    assert in_the_plan.weight_bytes(planned(config)) == max(num_bytes)


def test_files_that_nobody_loads_are_not_counted(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    alone = read_model_folder(folder).weight_bytes(1)
    write_safetensors(folder / "consolidated.safetensors", {"layers.0.wq": (1000, 1000)})
    assert read_model_folder(folder).weight_bytes(1) == alone


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers: the shards of an earlier download may be gone or stale."""
    folder = write_model_folder(tmp_path / "model")
    index = {"weight_map": dict.fromkeys(tensors_of(json.loads((folder / "config.json").read_text())), "stale-1.st")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = read_model_folder(folder).config
    assert {info.file.name for info in read_weights(folder, config).values()} == {"model.safetensors"}


def test_a_tied_head_that_is_saved_must_be_a_copy(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", tie_word_embeddings=True)
    read_model_folder(folder)
    with (folder / "model.safetensors").open("rb+") as stream:
        stream.seek(-1, 2)  # the head is the last tensor
        stream.write(b"\1")
    with pytest.raises(LoadError, match=r"tie_word_embeddings, but lm_head\.weight differs.*; set tie_word_embeddings"):
        read_model_folder(folder)
