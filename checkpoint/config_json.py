"""Reads config.json of a Hugging Face folder into a ModelConfig. What would change the arithmetic and is not
implemented is refused by name. Keys that no implementation of these architectures reads (training settings, version
stamps) are left alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoint.config import ModelConfig
from checkpoint.errors import LoadError
from checkpoint.json_files import read_json_object
from checkpoint.rope_json import parse_rope

Raw = Mapping[str, Any]

_MISTRAL_DEFAULT_WINDOW = 4096  # of a config.json without the key; null switches it off
_QWEN_DEFAULT_WINDOW = 4096
_QWEN_DEFAULT_FULL_LAYERS = 28
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


def read_config_json(folder: Path) -> Raw:
    """config.json as it stands. Raises LoadError."""
    if not folder.is_dir():
        raise LoadError(
            f"{folder} is not a folder: give the path of a model in Hugging Face layout "
            f"(a hub id must be downloaded first: hf download <id> --local-dir <folder>)"
        )
    return read_json_object(folder / "config.json")


def parse_config(raw: Raw) -> ModelConfig:
    """ModelConfig of a parsed config.json."""
    if quantization := raw.get("quantization_config") or raw.get("compression_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise LoadError(f"the checkpoint is quantised ({method})", "use unquantised weights: not built yet")
    architecture = _architecture(raw)
    _refuse_foreign_features(raw)
    return _ARCHITECTURES[architecture](architecture, raw)


def _architecture(raw: Raw) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) or f"none (model_type {raw.get('model_type')!r})"
    raise LoadError(f"config.json: architecture {found} is not supported; supported are {', '.join(_ARCHITECTURES)}")


def _refuse_foreign_features(raw: Raw) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise LoadError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
    for key in _FOREIGN:
        if raw.get(key):
            raise LoadError(f"config.json: {key} = {raw[key]!r} is not supported")


def _integer(raw: Raw, key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise LoadError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def _window(raw: Raw, default: int) -> int | None:
    if "sliding_window" not in raw:
        return default
    window = raw["sliding_window"]
    return None if window is None else _integer(raw, "sliding_window")


def _build(
    architecture: str,
    raw: Raw,
    *,
    head_dim: int | None = None,
    sliding_windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    num_q_heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    if raw.get("head_dim") is not None:
        head_dim = _integer(raw, "head_dim")
    eps = raw.get("rms_norm_eps")
    if not isinstance(eps, float) or eps <= 0:
        raise LoadError(f"config.json: rms_norm_eps must be a positive number, got {eps!r}")
    if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
        num_kv_heads = num_q_heads
    else:
        num_kv_heads = _integer(raw, "num_key_value_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=len(sliding_windows),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // max(num_q_heads, 1),
        max_position_embeddings=_integer(raw, "max_position_embeddings"),
        rms_norm_eps=eps,
        rope=parse_rope(raw),
        sliding_windows=sliding_windows,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _llama(architecture: str, raw: Raw) -> ModelConfig:
    num_layers = _integer(raw, "num_hidden_layers")
    if raw.get("sliding_window") is not None or _SLIDING in (raw.get("layer_types") or []):
        raise LoadError("config.json: a sliding window is not part of LlamaForCausalLM: set sliding_window to null")
    bias = bool(raw.get("attention_bias", False))
    return _build(
        architecture,
        {"num_key_value_heads": None, **raw},  # configs of Llama 1 and 2 may leave it out
        sliding_windows=(None,) * num_layers,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _mistral(architecture: str, raw: Raw) -> ModelConfig:
    window = _window(raw, _MISTRAL_DEFAULT_WINDOW)
    expected = _FULL if window is None else _SLIDING
    if set(raw.get("layer_types") or [expected]) != {expected}:
        raise LoadError("config.json: layer_types that differ between layers are not supported for MistralForCausalLM")
    return _build(architecture, raw, sliding_windows=(window,) * _integer(raw, "num_hidden_layers"))


def _qwen2(architecture: str, raw: Raw) -> ModelConfig:
    return _build(architecture, raw, sliding_windows=_qwen_windows(raw), qkv_bias=True)


def _qwen3(architecture: str, raw: Raw) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    windows = _qwen_windows(raw)
    return _build(architecture, raw, head_dim=128, sliding_windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen_windows(raw: Raw) -> tuple[int | None, ...]:
    """`layer_types` where given, else the first `max_window_layers` layers are full; all are without
    `use_sliding_window`."""
    num_layers = _integer(raw, "num_hidden_layers")
    window = _window(raw, _QWEN_DEFAULT_WINDOW) if raw.get("use_sliding_window", False) else None
    num_full = raw.get("max_window_layers", _QWEN_DEFAULT_FULL_LAYERS)
    by_depth = [_SLIDING if window is not None and i >= num_full else _FULL for i in range(num_layers)]
    layer_types = raw.get("layer_types") or by_depth
    if len(layer_types) != num_layers:
        raise LoadError(f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in (_FULL, _SLIDING):
            raise LoadError(f"config.json: layer type {layer_type!r} is not supported, only {_FULL} and {_SLIDING}")
    if window is None and _SLIDING in layer_types:
        raise LoadError("config.json: layer_types has sliding_attention, but there is no sliding_window in use")
    return tuple(window if layer_type == _SLIDING else None for layer_type in layer_types)


_ARCHITECTURES: dict[str, Callable[[str, Raw], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
