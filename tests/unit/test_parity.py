"""Logits equal those of transformers for every family, however a prompt is fed, and each feature changes them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.paged import FEEDS, run_seqs
from tests.helpers.tiny_models import FAMILIES, MAX_MODEL_LEN, TinyModel, make_tiny_model
from workers.collectives import SoloGroup
from workers.models.decoder import CausalLM
from workers.models.loading import load_model

TOLERANCE = 1e-4  # fp32
VISIBLE = 1e-3  # dropping a feature moves some logit by more


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and run 10 times slower where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    made: dict[str, TinyModel] = {}

    def get(family: str) -> TinyModel:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def load(folder: Path, dtype: torch.dtype = torch.float32, *, batch_invariant: bool = False) -> CausalLM:
    return load_model(
        folder,
        dtype=dtype,
        device=torch.device("cpu"),
        group=SoloGroup(),
        max_model_len=MAX_MODEL_LEN,
        batch_invariant=batch_invariant,
    )


def worst_difference(model: CausalLM, tiny: TinyModel, feed: str) -> float:
    logits = run_seqs(model, tiny.token_ids, feed)
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(logits, tiny.logits, strict=True))


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny: Callable[[str], TinyModel], family: str, feed: str) -> None:
    model = tiny(family)
    assert worst_difference(load(model.folder), model, feed) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-biases-tied", "qwen2-window", "qwen3-tied"])
def test_narrow_types_are_close_to_fp32(tiny: Callable[[str], TinyModel], family: str, dtype: torch.dtype) -> None:
    """Logits stay within 3 % of their size though layers round to 8 bits (bf16); with a wrong cast they would not."""
    logits = torch.cat(run_seqs(load(tiny(family).folder, dtype), tiny(family).token_ids, "chunks", dtype=dtype))
    expected = torch.cat(tiny(family).logits)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariance_reaches_every_layer(tiny: Callable[[str], TinyModel], dtype: torch.dtype) -> None:
    """The same bits in one piece, in chunks and step by step. Without the flag this model fails in both dtypes."""
    model = load(tiny("qwen3").folder, dtype, batch_invariant=True)
    logits = [torch.cat(run_seqs(model, tiny("qwen3").token_ids, feed, dtype=dtype)) for feed in FEEDS]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def drop_qkv_bias(model: CausalLM) -> None:
    for layer in model.layers:
        layer.attention.qkv_proj.bias = None


def drop_o_bias(model: CausalLM) -> None:
    for layer in model.layers:
        layer.attention.o_proj.bias = None


def drop_gate_up_bias(model: CausalLM) -> None:
    for layer in model.layers:
        layer.mlp.gate_up_proj.bias = None


def drop_down_bias(model: CausalLM) -> None:
    for layer in model.layers:
        layer.mlp.down_proj.bias = None


def drop_qk_norm(model: CausalLM) -> None:
    for layer in model.layers:
        layer.attention.q_norm = layer.attention.k_norm = None


def forget_q_norm_weight(model: CausalLM) -> None:
    for layer in model.layers:
        assert layer.attention.q_norm is not None
        layer.attention.q_norm.fill_(1.0)


def forget_k_norm_weight(model: CausalLM) -> None:
    for layer in model.layers:
        assert layer.attention.k_norm is not None
        layer.attention.k_norm.fill_(1.0)


def forget_input_norm_weight(model: CausalLM) -> None:
    model.layers[0].input_norm.fill_(1.0)


def forget_mlp_norm_weight(model: CausalLM) -> None:
    model.layers[0].mlp_norm.fill_(1.0)


def forget_final_norm_weight(model: CausalLM) -> None:
    model.norm.fill_(1.0)


@pytest.mark.parametrize(
    ("family", "mutate"),
    [
        ("llama-biases-tied", drop_qkv_bias),
        ("llama-biases-tied", drop_o_bias),
        ("llama-biases-tied", drop_gate_up_bias),
        ("llama-biases-tied", drop_down_bias),
        ("qwen2-window", drop_qkv_bias),
        ("qwen3-tied", drop_qkv_bias),
        ("qwen3-tied", drop_o_bias),
        ("qwen3", drop_qk_norm),
        ("qwen3", forget_q_norm_weight),
        ("qwen3", forget_k_norm_weight),
        ("llama", forget_input_norm_weight),
        ("llama", forget_mlp_norm_weight),
        ("llama", forget_final_norm_weight),
    ],
)
def test_every_parameter_counts(
    tiny: Callable[[str], TinyModel], family: str, mutate: Callable[[CausalLM], None]
) -> None:
    model = load(tiny(family).folder)
    mutate(model)
    assert worst_difference(model, tiny(family), "whole") > VISIBLE


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("llama-biases-tied", "rope_parameters", {"rope_type": "default", "rope_theta": 1000.0}),
        ("qwen2-window", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("mistral", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("mistral-window", "sliding_window", None),
        ("mistral-window", "sliding_window", 8),  # one token more
        ("qwen2-window", "layer_types", ["full_attention"] * 2),
        ("qwen2-window", "layer_types", ["sliding_attention"] * 2),
        ("qwen3", "rms_norm_eps", 1e-2),
    ],
)
def test_every_setting_counts(
    tiny: Callable[[str], TinyModel], tmp_path: Path, family: str, key: str, value: object
) -> None:
    folder = tiny(family).folder
    config = json.loads((folder / "config.json").read_text())
    assert key in config, f"the saved config has no {key}: the mutation would test nothing"
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert worst_difference(load(tmp_path), tiny(family), "whole") > VISIBLE
