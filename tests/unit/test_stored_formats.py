"""Checkpoints in few bits: logits equal those of the dequantised model, bytes are planned, and others are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.config_json import load_model_config
from checkpoint.errors import LoadError
from checkpoint.folder import read_model_folder
from checkpoint.kept_bits import kept_bits_problem
from checkpoint.stored_format import parse_stored_format
from cluster.deployment.settings import CpuSettings, ModelSettings
from cluster.deployment.stored_weights import resolve_weights
from cluster.local import LocalDraft, local_settings
from cluster.planning.notes import stored_weights_notes
from kernels.native.quantized import NativeQuantizedWeight
from tests.helpers import stored_models
from tests.helpers.deployment_streams import TARGET
from tests.helpers.paged import run_seqs
from tests.helpers.stored_models import BLOCK, GROUP_SIZE, Stored, compressed, compressed_config, write_stored
from tests.helpers.thread_group import run_ranks
from tests.helpers.tiny_models import MAX_MODEL_LEN, TinyModel, make_tiny_model
from workers.collectives import Group, SoloGroup
from workers.models.decoder import CausalLM
from workers.models.loading import load_model

Case = tuple[dict[str, Any], Callable[[Tensor], Stored]]


def of_compressed_tensors(format: str, **weights: Any) -> Case:
    return compressed_config(format, **weights), compressed(format, **weights)


def of_gptq(**options: Any) -> Case:
    settings = {"quant_method": "gptq", "bits": options.get("num_bits", 4), "group_size": GROUP_SIZE, "sym": False}
    settings |= {"desc_act": not options.get("in_order", True), "checkpoint_format": options.get("version", "gptq")}
    return settings, stored_models.gptq(**options)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP_SIZE}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
CASES: dict[str, Case] = {
    "W4A16": of_compressed_tensors("pack-quantized", **INT4, symmetric=True),
    "W4A16 with zero points": of_compressed_tensors("pack-quantized", **INT4, symmetric=False),
    "W8A16": of_compressed_tensors("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "int8": of_compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "FP8, tensor": of_compressed_tensors("float-quantized", **FP8, strategy="tensor"),
    "FP8, channel": of_compressed_tensors("float-quantized", **FP8, strategy="channel"),
    "FP8, blocks": ({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, stored_models.fp8_blocks),
    "GPTQ": of_gptq(),
    "GPTQ, 8 bits": of_gptq(num_bits=8),
    "GPTQ, version 2, by activation order": of_gptq(version="gptq_v2", in_order=False),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"},
        stored_models.awq,
    ),
}
KEPT = ["W4A16", "W4A16 with zero points", "W8A16", "int8", "GPTQ", "GPTQ, 8 bits", "AWQ"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(TARGET / "tokenizer.json", folder)
    return make_tiny_model("llama", folder, intermediate_size=96, head_dim=32, attention_bias=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Two ranks cut it between groups, and its matrices need no padding."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copy(TARGET / "tokenizer.json", folder)
    return make_tiny_model("llama", folder, intermediate_size=128, head_dim=32, attention_bias=True)


@pytest.fixture(params=CASES)
def folders(request: pytest.FixtureRequest, tiny: TinyModel, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_stored(tmp_path, tiny.folder, *CASES[request.param])
    return tmp_path


def load(folder: Path, group: Group, **options: bool) -> CausalLM:
    return load_model(
        folder, dtype=torch.float32, device=torch.device("cpu"), group=group, max_model_len=MAX_MODEL_LEN, **options
    )


def logits(folder: Path, token_ids: list[list[int]], group: Group, **options: bool) -> list[Tensor]:
    return run_seqs(load(folder, group, **options), token_ids, "chunks")


def test_logits_equal_those_of_the_dequantised_model(folders: Path, tiny: TinyModel) -> None:
    stored = logits(folders / "stored", tiny.token_ids, SoloGroup())
    dense = logits(folders / "dense", tiny.token_ids, SoloGroup())
    for ours, theirs, unrounded in zip(stored, dense, tiny.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (theirs - unrounded).abs().max() > 1e-3, "the rounding shows"


def test_ranks_take_their_parts(folders: Path, tiny: TinyModel) -> None:
    def run(group: Group) -> list[Tensor]:
        return logits(folders / "stored", tiny.token_ids, group)

    parts = run_ranks(2, run)
    dense = logits(folders / "dense", tiny.token_ids, SoloGroup())
    for index, expected in enumerate(dense):
        torch.testing.assert_close(torch.cat([part[index] for part in parts], dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_bits_that_are_kept_mean_the_same(
    name: str, batch_invariant: bool, num_ranks: int, wide: TinyModel, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    write_stored(tmp_path, wide.folder, *CASES[name])

    def run(group: Group) -> tuple[list[Tensor], int]:
        model = load(tmp_path / "stored", group, keeps_bits=True, batch_invariant=batch_invariant)
        assert isinstance(model.layers[0].mlp.down_proj.weight, NativeQuantizedWeight)
        return run_seqs(model, wide.token_ids, "chunks"), model.weight_bytes

    parts = run_ranks(num_ranks, run)
    for index, expected in enumerate(logits(tmp_path / "dense", wide.token_ids, SoloGroup())):
        ours = torch.cat([part[index] for part, _ in parts], dim=1)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    folder = read_model_folder(tmp_path / "stored", dtype="float32")
    kept = replace(folder, keeps_bits=True)
    assert kept_bits_problem(folder.config, folder.weights, num_ranks=num_ranks) is None
    planned = kept.weight_bytes(num_ranks)
    # Ranks that split the inputs of a projection each need the scales of all its outputs.
    assert planned <= parts[0][1] <= 1.01 * planned < folder.weight_bytes(num_ranks)


CANNOT_KEEP = {
    "FP8, blocks": (1, "cpu", "its codes are FP8, and only integers have products"),
    "GPTQ, version 2, by activation order": (1, "cpu", "its groups are ordered by activation (desc_act)"),
    "W4A16": (2, "cpu", "its groups have 32 inputs, and the model's intermediate size on a rank is 48"),
    "AWQ": (1, "cuda", "on cuda, batch_invariant has products with dense weights only"),
}


@pytest.mark.parametrize("name", CANNOT_KEEP)
def test_what_cannot_be_kept_is_dequantised_or_refused(name: str, tiny: TinyModel, tmp_path: Path) -> None:
    write_stored(tmp_path, tiny.folder, *CASES[name])
    num_ranks, device, reason = CANNOT_KEEP[name]
    model = ModelSettings(role="target", folder=read_model_folder(tmp_path / "stored"), tp_size=num_ranks)
    held, problem = resolve_weights(model, "auto", device, compiles=True, batch_invariant=device == "cuda")
    assert not held.folder.keeps_bits
    assert problem is None
    _, problem = resolve_weights(model, "stored", device, compiles=True, batch_invariant=device == "cuda")
    assert problem is not None
    assert (problem.path, problem.message) == ("target.weights", f"cannot be: {reason}")


def test_one_product_needs_one_format(tiny: TinyModel, tmp_path: Path) -> None:
    write_stored(tmp_path, tiny.folder, *CASES["W4A16"])
    folder = read_model_folder(tmp_path / "stored")
    name = "model.layers.1.self_attn.v_proj.weight"
    weights = {**folder.weights, name: read_model_folder(tmp_path / "dense").weights[name]}
    problem = kept_bits_problem(folder.config, weights, num_ranks=1)
    assert (
        problem
        == f"one product computes {name.replace('v_proj', 'q_proj')} and {name}, and only one of them is quantised"
    )


def test_an_order_that_only_the_weights_tell_is_noticed_at_load(tiny: TinyModel, tmp_path: Path) -> None:
    settings, store = CASES["GPTQ, version 2, by activation order"]
    write_stored(tmp_path, tiny.folder, settings | {"desc_act": False}, store)
    with pytest.raises(LoadError, match="not in the order of their groups") as error:
        load(tmp_path / "stored", SoloGroup(), keeps_bits=True)
    assert error.value.remedy == "set target.weights: dequantized"


def test_the_plan_counts_what_workers_hold_and_what_they_read(folders: Path) -> None:
    stored, dense = (read_model_folder(folders / name) for name in ("stored", "dense"))
    assert stored.weight_bytes(2) == dense.weight_bytes(2)
    assert sum(info.num_bytes for info in stored.weights.values()) < sum(
        info.num_bytes for info in dense.weights.values()
    )


def test_the_plan_names_the_format(tiny: TinyModel, tmp_path: Path) -> None:
    write_stored(tmp_path, tiny.folder, *CASES["AWQ"])
    made_draft = LocalDraft(folder=tmp_path / "stored", quantization="int8", colocated=True)
    settings = local_settings(tmp_path / "stored", draft=made_draft, dtype="bfloat16")
    assert list(stored_weights_notes(settings)) == [
        "the target's weights are stored as AWQ, int4, groups of 32; workers keep these bits",
        "the draft's weights are stored as AWQ, int4, groups of 32; workers hold them in int8",
    ]
    off = local_settings(tmp_path / "stored", dtype="bfloat16", cpu=CpuSettings(compile="off"))
    assert list(stored_weights_notes(off)) == [
        "the target's weights are stored as AWQ, int4, groups of 32; workers hold them in bfloat16, because "
        "cpu.compile is off, and torch multiplies by such weights slowly",
    ]


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": ({"quant_method": "bitsandbytes"}, r"quantised \(bitsandbytes\), supported are compressed-tensors, fp8"),
    "no method": ({}, r"quantised \(None\)"),
    "not an object": ("awq", "quantization_config must be an object"),
    "marlin": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, 'version "gemv" is not'),
    "3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3 is not supported; use 4 or 8"),
    "nvfp4": (compressed_config("nvfp4-pack-quantized", num_bits=4), 'format "nvfp4-pack-quantized" is not supported'),
    "2 bits": (compressed_config("pack-quantized", num_bits=2), "num_bits 2 is not supported"),
    "fp4": (compressed_config("float-quantized", num_bits=4, type="float"), "num_bits 4 is not supported"),
    "KV": (
        compressed_config("pack-quantized", **INT4) | {"kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme .* is not supported",
    ),
    "two groups": (compressed_config("pack-quantized") | {"config_groups": {"a": {}, "b": {}}}, "a single group"),
    "odd group": (compressed_config("pack-quantized") | {"config_groups": {"a": 3}}, "3 in the place of an object"),
    "no blocks": ({"quant_method": "fp8"}, "weight_block_size null is not supported"),
    "strategy": (compressed_config("pack-quantized", num_bits=4, strategy="token"), 'strategy "token" is not'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(LoadError, match=message):
        parse_stored_format(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 16}, r"weight_scale is F(16|32) \[128, 2\], config.json makes it .* \[128, 4\]"),
        ({"num_bits": 8}, r"weight_packed is I32 .* config.json makes it I32"),
    ],
)
def test_tensors_must_be_those_of_the_config(
    tiny: TinyModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_stored(tmp_path, tiny.folder, *CASES["W4A16"])
    path = tmp_path / "stored" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(LoadError, match=message):
        read_model_folder(tmp_path / "stored")


def test_matrices_that_were_left_alone_are_read_as_they_are(tiny: TinyModel, tmp_path: Path) -> None:
    config = json.loads((tiny.folder / "config.json").read_text())
    for file in tiny.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": CASES["W4A16"][0]}))
    assert load_model_config(tmp_path).stored_as is not None
    for ours, theirs in zip(logits(tmp_path, tiny.token_ids, SoloGroup()), tiny.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
