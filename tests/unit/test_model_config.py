"""config.json as either generation of transformers writes it, and refusals that name what is not supported."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.config_json import load_model_config, parse_config
from checkpoint.errors import LoadError
from checkpoint.rope import DynamicRope, Rope

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 240,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def variant(architecture: str, **changes: Any) -> dict[str, Any]:
    return {**LLAMA, "architectures": [architecture], **changes}


def test_llama_2_as_transformers_4_wrote_it() -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config = parse_config(raw | {"rope_theta": 5e5, "pretraining_tp": 1, "torch_dtype": "float16", "use_mrope": False})
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (12, 12, 8)
    assert config.rope == Rope(theta=5e5)
    assert config.sliding_windows == (None,) * 4
    features = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings)
    assert not any(features)


def test_head_dim_may_be_given_or_null() -> None:
    assert parse_config(LLAMA | {"head_dim": 32}).head_dim == 32
    assert parse_config(LLAMA | {"head_dim": None}).head_dim == 8
    assert parse_config(variant("Qwen3ForCausalLM")).head_dim == 128  # the default of Qwen3Config


def test_kv_heads_may_be_null_but_only_llama_leaves_them_out() -> None:
    assert parse_config(variant("MistralForCausalLM", num_key_value_heads=None)).num_kv_heads == 12
    raw = {key: value for key, value in variant("Qwen2ForCausalLM").items() if key != "num_key_value_heads"}
    with pytest.raises(LoadError, match=r"num_key_value_heads must be an integer .*, got null"):
        parse_config(raw)


def test_biases_by_family() -> None:
    llama = parse_config(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse_config(variant("Qwen2ForCausalLM"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parse_config(variant("Qwen3ForCausalLM"))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)


def test_mistral_window() -> None:
    assert parse_config(variant("MistralForCausalLM", sliding_window=64)).sliding_windows == (64,) * 4
    assert parse_config(variant("MistralForCausalLM", sliding_window=None)).sliding_windows == (None,) * 4
    assert parse_config(variant("MistralForCausalLM")).sliding_windows == (4096,) * 4  # the default of MistralConfig


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_window(architecture: str) -> None:
    used = {"use_sliding_window": True, "sliding_window": 64}
    by_depth = variant(architecture, **used, max_window_layers=3)
    assert parse_config(by_depth).sliding_windows == (None, None, None, 64)
    assert parse_config(by_depth | {"use_sliding_window": False}).sliding_windows == (None,) * 4
    layer_types = ["sliding_attention", "full_attention"] * 2
    assert parse_config(by_depth | {"layer_types": layer_types}).sliding_windows == (64, None, 64, None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}, "bitsandbytes"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_mrope": True}, "use_mrope"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads must be a divisor of num_attention_heads \(12\), got 5"),
        ({"head_dim": 9}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "96"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        parse_config(LLAMA | changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "complaint"),
    [
        ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["full_attention"] * 3},
            "layer_types must be a list with an entry for each of the 4 layers",
        ),
        ("Qwen3ForCausalLM", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
    ],
)
def test_unsupported_windows_are_refused(architecture: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        parse_config(variant(architecture, **changes))


def test_tp_sizes_that_split() -> None:
    config = parse_config(LLAMA)  # 12 query heads, 4 KV heads, intermediate 240
    for tp_size in (1, 2, 4, 12):  # 12: three ranks share a KV head
        config.check_tp_size(tp_size)


@pytest.mark.parametrize("tp_size", [3, 5, 6, 8])
def test_tp_sizes_that_do_not_split_are_refused_with_those_that_do(tp_size: int) -> None:
    with pytest.raises(LoadError, match=rf"tensor_parallel_size: {tp_size}: .*; use one of 1, 2, 4, 12$"):
        parse_config(LLAMA).check_tp_size(tp_size)


def test_a_rank_without_vocabulary_is_refused() -> None:
    with pytest.raises(LoadError, match="vocabulary of 5"):
        parse_config(LLAMA | {"vocab_size": 5}).check_tp_size(4)


def test_max_model_len() -> None:
    parse_config(LLAMA).check_max_model_len(512)
    with pytest.raises(LoadError, match="max_model_len 513 exceeds the 512"):
        parse_config(LLAMA).check_max_model_len(513)
    parse_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}).check_max_model_len(1024)


def test_dynamic_rope_is_served_up_to_its_original_length() -> None:
    config = parse_config(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert isinstance(config.rope, DynamicRope)
    config.check_max_model_len(512)
    with pytest.raises(LoadError, match=r"the 512 positions .* DynamicRope"):
        config.check_max_model_len(513)


def test_errors_of_a_folder_name_it(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"meta-llama/Llama-3\.2-1B is not a folder.*download"):
        load_model_config(Path("meta-llama/Llama-3.2-1B"))
    with pytest.raises(LoadError, match=r"has no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json is not JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "relu"}))
    with pytest.raises(LoadError, match=rf"^{tmp_path}: .*relu"):
        load_model_config(tmp_path)
