"""Reads config.json of a Hugging Face folder into a ModelConfig. What would change the arithmetic and is not
implemented is refused by name. Keys that no implementation of these architectures reads (training settings, version
stamps) are left alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint.config import ModelConfig
from checkpoint.errors import LoadError, shown
from checkpoint.fields import Fields
from checkpoint.json_files import read_json_object
from checkpoint.rope_json import parse_rope
from checkpoint.stored_format import parse_stored_format

_MAX_LAYERS = 4096  # of a config.json that means what it says
_MISTRAL_DEFAULT_WINDOW = 4096  # of a config.json without the key; null switches it off
_QWEN_DEFAULT_WINDOW = 4096
_QWEN_DEFAULT_FULL_LAYERS = 28
_QWEN3_DEFAULT_HEAD_DIM = 128
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Features of other families that forks add to these; anything but "off" (null, false, 0, []) would change the result.
_FOREIGN = (
    "num_experts",
    "num_local_experts",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_sinks",
    "attention_chunk_size",
    "use_mrope",
    "no_rope_layers",
)


def load_model_config(folder: Path) -> ModelConfig:
    """Configuration of the model in `folder`; LoadError where it is missing, damaged or of a kind not supported."""
    raw = read_config_json(folder)
    try:
        return parse_config(raw)
    except LoadError as error:
        raise LoadError(f"{folder}: {error.message}", error.remedy) from error


def read_config_json(folder: Path) -> Mapping[str, Any]:
    """config.json as it stands. Raises LoadError."""
    if not folder.is_dir():
        raise LoadError(
            f"{folder} is not a folder",
            "give the path of a model in Hugging Face layout (a hub id must be downloaded first: "
            "hf download <id> --local-dir <folder>)",
        )
    return read_json_object(folder / "config.json")


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json. Raises LoadError."""
    config = Fields("config.json", raw)
    stored = config.get("quantization_config") or config.get("compression_config")
    architecture = _architecture(config)
    _refuse_foreign_features(config)
    parsed = _ARCHITECTURES[architecture](architecture, config)
    return replace(parsed, stored_as=parse_stored_format(stored)) if stored else parsed


def _architecture(config: Fields) -> str:
    names = config.texts("architectures")
    for name in names:
        if name in _ARCHITECTURES:
            return name
    found = f"architectures {shown(names)} are" if names else "architectures is not set, and without it no model is"
    model_type = f" (model_type {shown(config.get('model_type'))})"
    raise LoadError(
        f"config.json: {found} not supported{model_type}", f"use a model with one of {', '.join(_ARCHITECTURES)}"
    )


def _refuse_foreign_features(config: Fields) -> None:
    if config.has("hidden_act") and config.get("hidden_act") != "silu":
        raise config.unsupported("hidden_act", "use a model with 'silu'")
    for key in _FOREIGN:
        if config.get(key):
            raise config.unsupported(key, "use a model without it")


def _num_layers(config: Fields) -> int:
    return config.integer("num_hidden_layers", most=_MAX_LAYERS)


def _window(config: Fields, default: int) -> int | None:
    if config.has("sliding_window") and config.get("sliding_window") is None:
        return None
    return config.integer("sliding_window", default=default)


def _head_dim(config: Fields, default: int | None) -> int:
    """Where neither file nor family gives one, the hidden size is cut into heads."""
    if config.get("head_dim") is not None or default is not None:
        head_dim = config.integer("head_dim", default=default)
        if head_dim % 2:
            raise config.wrong("head_dim", "even")
        return head_dim
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = hidden_size // num_heads
    if head_dim < 2 or head_dim % 2:
        raise config.wrong("num_attention_heads", f"such that hidden_size {hidden_size} makes heads of an even size")
    return head_dim


def _num_kv_heads(config: Fields, num_q_heads: int, *, may_be_left_out: bool) -> int:
    default = num_q_heads if may_be_left_out or config.has("num_key_value_heads") else None
    num_kv_heads = config.integer("num_key_value_heads", default=default)
    if num_q_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_q_heads})")
    return num_kv_heads


def _build(
    architecture: str,
    config: Fields,
    *,
    default_head_dim: int | None = None,
    kv_heads_may_be_left_out: bool = False,
    sliding_windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    num_q_heads = config.integer("num_attention_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_layers=len(sliding_windows),
        num_q_heads=num_q_heads,
        num_kv_heads=_num_kv_heads(config, num_q_heads, may_be_left_out=kv_heads_may_be_left_out),
        head_dim=_head_dim(config, default_head_dim),
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps"),
        rope=parse_rope(config),
        sliding_windows=sliding_windows,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings"),
    )


def _llama(architecture: str, config: Fields) -> ModelConfig:
    if config.get("sliding_window") is not None:
        raise config.unsupported("sliding_window", f"set it to null: it is not part of {architecture}")
    if _SLIDING in config.texts("layer_types"):
        raise config.unsupported("layer_types", f"take it out: sliding windows are not part of {architecture}")
    bias = config.flag("attention_bias")
    return _build(
        architecture,
        config,
        kv_heads_may_be_left_out=True,  # by configs of Llama 1 and 2
        sliding_windows=(None,) * _num_layers(config),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
    )


def _mistral(architecture: str, config: Fields) -> ModelConfig:
    window = _window(config, _MISTRAL_DEFAULT_WINDOW)
    expected = _FULL if window is None else _SLIDING
    if set(config.texts("layer_types")) - {expected}:
        raise config.unsupported(
            "layer_types", f"take it out: sliding_window {window} makes all layers of {architecture} {expected}"
        )
    return _build(architecture, config, sliding_windows=(window,) * _num_layers(config))


def _qwen2(architecture: str, config: Fields) -> ModelConfig:
    return _build(architecture, config, sliding_windows=_qwen_windows(config), qkv_bias=True)


def _qwen3(architecture: str, config: Fields) -> ModelConfig:
    bias = config.flag("attention_bias")
    return _build(
        architecture,
        config,
        default_head_dim=_QWEN3_DEFAULT_HEAD_DIM,
        sliding_windows=_qwen_windows(config),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


def _qwen_windows(config: Fields) -> tuple[int | None, ...]:
    """`layer_types` where given, else the first `max_window_layers` layers are full; all are without
    `use_sliding_window`."""
    num_layers = _num_layers(config)
    window = _window(config, _QWEN_DEFAULT_WINDOW) if config.flag("use_sliding_window") else None
    num_full = config.integer("max_window_layers", default=_QWEN_DEFAULT_FULL_LAYERS, least=0)
    by_depth = [_SLIDING if window is not None and i >= num_full else _FULL for i in range(num_layers)]
    layer_types = config.texts("layer_types") or by_depth
    if len(layer_types) != num_layers:
        raise config.wrong("layer_types", f"a list with an entry for each of the {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in (_FULL, _SLIDING):
            raise config.wrong("layer_types", f"of {_FULL} and {_SLIDING}, not {shown(layer_type)}")
    if window is None and _SLIDING in layer_types:
        raise config.wrong("layer_types", f"without {_SLIDING} where no sliding_window is in use")
    return tuple(window if layer_type == _SLIDING else None for layer_type in layer_types)


_ARCHITECTURES: dict[str, Callable[[str, Fields], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
