"""What planning must know of a model: read from its folder without torch or transformers.

Shapes come from the safetensors headers, so the memory plan counts the tensors that are there, not those that a
formula expects.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from checkpoint.config import ModelConfig
from checkpoint.config_json import parse_config, read_config_json
from checkpoint.errors import LoadError
from checkpoint.json_files import read_eos_token_ids
from checkpoint.tensors import TensorInfo, read_tensors

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_SAFETENSORS_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Cut among tensor-parallel ranks; everything else (norms, biases of row-parallel layers) is held by each rank.
_SHARDED_MODULES: Final = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_KV_MODULES: Final = ("k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """The facts of one model folder in Hugging Face layout."""

    path: Path
    config: ModelConfig
    dtype: str  # "bfloat16" | "float16" | "float32"
    eos_token_ids: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]

    def weight_bytes(self, tp_size: int, dtype: str) -> int:
        """Bytes of weights on one of `tp_size` ranks once they are loaded as `dtype`."""
        return (
            sum(self._elements_per_rank(name, tensor, tp_size) for name, tensor in self.held_tensors)
            * DTYPE_BYTES[dtype]
        )

    @property
    def held_tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """Those that are loaded, by name: a head that is the embedding is none of its own."""
        tied = self.config.tie_word_embeddings
        return ((name, info) for name, info in self.tensors.items() if not (tied and name.startswith("lm_head.")))

    def kv_bytes_per_token(self, tp_size: int, dtype: str) -> int:
        """Bytes of keys and values that one token takes on one rank."""
        return (
            2
            * self.config.num_layers
            * self.config.kv_heads_per_rank(tp_size)
            * self.config.head_dim
            * DTYPE_BYTES[dtype]
        )

    def activation_bytes(self, tp_size: int, dtype: str, *, num_tokens: int) -> int:
        """Estimate of the largest working set of one forward, that of one layer: hidden states and residual, the fused
        query-key-value or gate-up product and its result."""
        config = self.config
        qkv = (config.num_q_heads // tp_size + 2 * config.kv_heads_per_rank(tp_size)) * config.head_dim
        mlp = 3 * config.intermediate_size // tp_size
        return num_tokens * (3 * config.hidden_size + max(2 * qkv, mlp)) * DTYPE_BYTES[dtype]

    def _elements_per_rank(self, name: str, tensor: TensorInfo, tp_size: int) -> int:
        module = name.split(".")[-2] if "." in name else ""
        if module in _KV_MODULES:
            return tensor.num_elements * self.config.kv_heads_per_rank(tp_size) // self.config.num_kv_heads
        is_row_parallel_bias = module in ("o_proj", "down_proj") and name.endswith(".bias")
        if module in _SHARDED_MODULES and not is_row_parallel_bias:
            return -(-tensor.num_elements // tp_size)
        return tensor.num_elements


def find_model(model: str, relative_to: Path) -> Path:
    """The folder that `model` names: a path (relative ones start at `relative_to`) or a hub id in the local cache.

    Nothing is downloaded: a deployment must not fail, or change, because a hub did.
    """
    try:
        path = (relative_to / Path(model).expanduser()).resolve()
    except RuntimeError as err:  # pathlib's way to say that "~somebody" is nobody
        raise LoadError("starts with ~ and a user that does not exist", "write the path out") from err
    if path.is_dir():
        return path
    looks_like_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise LoadError(f"there is no such folder: {path}", "give a folder in Hugging Face layout, or a hub id")
    cached = _cached_snapshot(model)
    if cached is None:
        raise LoadError(
            f"neither a folder ({path}) nor a model in the Hugging Face cache ({_hub_cache()})",
            f"run: hf download {model}",
        )
    return cached


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached_snapshot(hub_id: str) -> Path | None:
    repository = _hub_cache() / f"models--{hub_id.replace('/', '--')}"
    main = repository / "refs" / "main"
    if not main.is_file():
        return None
    snapshot = repository / "snapshots" / main.read_text().strip()
    return snapshot if snapshot.is_dir() else None


def read_model_folder(path: Path) -> ModelFolder:
    """Read the facts of a folder. Raises LoadError for what is missing, broken or not supported."""
    raw = read_config_json(path)
    config = parse_config(raw)
    if not (path / "tokenizer.json").is_file():
        raise LoadError("tokenizer.json is missing", "save the tokeniser in the fast format into the folder")
    tensors = read_tensors(path)
    return ModelFolder(
        path=path,
        config=config,
        dtype=_dtype(raw, tensors),
        eos_token_ids=read_eos_token_ids(path),
        tensors=tensors,
    )


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """The config's dtype (older files call it torch_dtype), else that of the first tensor."""
    named = config.get("dtype") or config.get("torch_dtype") or _first_dtype(tensors)
    if named not in DTYPE_BYTES:
        raise LoadError(f"config.json: dtype is {named!r}", f"use one of {', '.join(DTYPE_BYTES)}")
    return str(named)


def _first_dtype(tensors: Mapping[str, TensorInfo]) -> str | None:
    first = next(iter(tensors.values()), None)
    return None if first is None else _SAFETENSORS_DTYPES.get(first.dtype)
