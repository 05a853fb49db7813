"""Valid model folders, tiny and random, of every family and in every layout: mutations start from these."""

import json
import random
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from checkpoint.config_json import parse_config
from checkpoint.weights import expected_tensors

_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"},
    "llama-3": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 16,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 128},
        "torch_dtype": "float16",
        "tie_word_embeddings": True,
    },
    "llama-biases": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
    "llama-dynamic": {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 64, "head_dim": None},
    "mistral-full": {"architectures": ["MistralForCausalLM"], "sliding_window": None, "dtype": "float32"},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 1,
        "rope_scaling": _YARN,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 8,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "full_attention"],
    },
}
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJK"


def write_valid_folder(path: Path, family: str, *, weights: str = "BF16", num_shards: int = 1) -> Path:
    """Writes a folder. `weights`: the dtype of all tensors; with `num_shards` > 1 there is an index."""
    config = {**_SIZES, **CONFIGS[family]}
    path.mkdir(parents=True)
    write_json(path / "config.json", config)
    write_json(
        path / "generation_config.json", {"eos_token_id": [2, 3], "temperature": 0.7, "top_k": 5, "max_new_tokens": 9}
    )
    write_json(path / "tokenizer_config.json", {"chat_template": _TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"})
    _write_tokenizer(path)
    shapes = dict(expected_tensors(parse_config(config)))
    if family == "llama-3":
        shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    names = sorted(shapes)
    if num_shards == 1:
        write_random_safetensors(path / "model.safetensors", shapes, weights)
        return path
    files = {
        name: f"model-{1 + index % num_shards:05}-of-{num_shards:05}.safetensors" for index, name in enumerate(names)
    }
    for file in set(files.values()):
        write_random_safetensors(path / file, {name: shapes[name] for name in names if files[name] == file}, weights)
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": files})
    return path


def write_random_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Writes small values: the bytes of 16-bit floats with small exponents, or the same twice for fp32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _DTYPE_BYTES[dtype] * _product(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    rng = random.Random(end)
    data = bytes(b for _ in range(end // 2) for b in (rng.randrange(256), 0x3C | rng.randrange(2) << 7))
    write_with_header(path, header, data)


def read_with_header(path: Path) -> tuple[Any, bytes]:
    """The header and the data after it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_with_header(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write_tokenizer(path: Path) -> None:
    vocab = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>", *_LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
