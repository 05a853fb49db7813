"""Folders of published models for the control plane: config.json and shapes as published, holes as weights."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.model_folders import CONFIG, tensors_of, write_model_folder, write_safetensors

_LAYERS_OF_A_SHARD = 8


def _llama(layers: int, hidden: int, mlp: int, heads: int, head_dim: int, rope_factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return CONFIG | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": rope | {"original_max_position_embeddings": 8192},
        "tie_word_embeddings": rope_factor > 8,
    }


def _qwen3(layers: int, hidden: int, mlp: int, heads: int) -> dict[str, Any]:
    return CONFIG | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": hidden < 4096,
    }


CONFIGS = {
    "Llama-3.1-8B-Instruct": _llama(32, 4096, 14336, 32, 128, 8.0),
    "Llama-3.3-70B-Instruct": _llama(80, 8192, 28672, 64, 128, 8.0),
    "Llama-3.2-1B-Instruct": _llama(16, 2048, 8192, 32, 64, 32.0),
    "Llama-3.2-3B-Instruct": _llama(28, 3072, 8192, 24, 128, 32.0),
    "Qwen3-32B": _qwen3(64, 5120, 25600, 64),
    "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16),
    "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16),
}


def write_real_shapes(path: Path) -> Path:
    """Write the model that the folder's name says, in several files. Only its tokeniser is a toy."""
    config = CONFIGS[path.name]
    write_model_folder(path, **config)
    (path / "model.safetensors").unlink()
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in real_tensors(config).items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        shards.setdefault(f"model-{layer // _LAYERS_OF_A_SHARD:05}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        write_safetensors(path / file, tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def real_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors = tensors_of(config)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if config["model_type"] == "qwen3":
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}.self_attn"
            tensors |= {f"{prefix}.{name}_norm.weight": (config["head_dim"],) for name in ("q", "k")}
    return tensors
