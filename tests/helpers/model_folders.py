"""Model folders in Hugging Face layout that the control plane can read: real headers, zeros as weights, no torch."""

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
TOKENS = ("<unk>", "<s>", "</s>", "a", "b", "ab")


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Writes bfloat16 zeros of these shapes. The bytes are a hole in the file, so large models take no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * _product(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def write_model_folder(path: Path, *, tokens: tuple[str, ...] = TOKENS, **config: Any) -> Path:
    """Writes a folder with CONFIG and these changes."""
    merged = {**CONFIG, **config}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(merged))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")] if "ab" in vocab else []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tokens[:3]))
    tokenizer.save(str(path / "tokenizer.json"))
    write_safetensors(path / "model.safetensors", tensors_of(merged))
    return path


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
