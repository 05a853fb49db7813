"""What planning must know of a model: read from its folder without torch or transformers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from checkpoint.config import ModelConfig
from checkpoint.config_json import parse_config, read_config_json
from checkpoint.eos import EosToken, read_eos_tokens
from checkpoint.errors import LoadError
from checkpoint.fields import Fields
from checkpoint.json_files import read_text
from checkpoint.kept_bits import kept_bytes
from checkpoint.memory import forward_bytes
from checkpoint.quantization import Quantization
from checkpoint.stored_matrices import StoredMatrix
from checkpoint.tensors import TensorInfo
from checkpoint.tokenizer import load_tokenizer
from checkpoint.weights import EMBEDDING, HEAD, WEIGHT_DTYPES, expected_tensors, read_weights

_DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
# Cut among tensor-parallel ranks; everything else (norms, biases of row-parallel layers) is held by each rank.
_SHARDED_MODULES: Final = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KV_MODULES: Final = ("k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """The facts of one model folder in Hugging Face layout."""

    path: Path
    config: ModelConfig
    dtype: str  # "bfloat16" | "float16" | "float32": the one asked for, else the checkpoint's own
    eos: tuple[EosToken, ...]
    weights: Mapping[str, TensorInfo]  # what is loaded, by name
    quantization: Quantization | None = None  # how the matrices are rounded at load
    keeps_bits: bool = False  # matrices that the checkpoint stores in few bits stay in them

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.eos)

    @property
    def value_bytes(self) -> int:
        """Of a weight, a key or an activation."""
        return _DTYPE_BYTES[self.dtype]

    def weight_bytes(self, tp_size: int) -> int:
        """Bytes of weights on the fullest of `tp_size` ranks once they are loaded."""
        elements = {name: self._elements_per_rank(name, tensor, tp_size) for name, tensor in self.weights.items()}
        return sum(self.bytes_of(name, num_elements) for name, num_elements in elements.items())

    def bytes_of(self, name: str, num_elements: int) -> int:
        """Bytes of so many elements of a tensor once they are loaded."""
        tensor = self.weights[name]
        if self.keeps_bits and isinstance(tensor, StoredMatrix):
            return kept_bytes(tensor, num_elements)
        shape = tensor.shape
        if self.quantization is None or len(shape) == 1 or name == EMBEDDING:
            return num_elements * self.value_bytes
        return self.quantization.num_bytes(num_elements, in_features=shape[1], is_head=name == HEAD)

    def first_layers(self, num_layers: int) -> "ModelFolder":
        """What a model of the first layers loads; 0: all. Raises LoadError if there are fewer."""
        config = self.config.first_layers(num_layers)
        names = {name for name, _ in expected_tensors(config)}
        return replace(self, config=config, weights={k: v for k, v in self.weights.items() if k in names})

    def rounded(self, quantization: Quantization) -> "ModelFolder":
        """The same with matrices that are rounded at load. A tied head becomes a matrix of its own."""
        return replace(
            self, weights={HEAD: self.weights[EMBEDDING], **self.weights}, quantization=quantization, keeps_bits=False
        )

    def kv_bytes_per_token(self, tp_size: int) -> int:
        """Bytes of keys and values that one token takes on one rank."""
        config = self.config
        return 2 * config.num_layers * config.kv_heads_per_rank(tp_size) * config.head_dim * self.value_bytes

    def activation_bytes(self, tp_size: int, *, num_tokens: int) -> int:
        """Estimate of the largest working set of one forward."""
        return forward_bytes(self.config, tp_size, num_tokens=num_tokens, value_bytes=self.value_bytes)

    def _elements_per_rank(self, name: str, tensor: TensorInfo, tp_size: int) -> int:
        if name in (EMBEDDING, HEAD):
            return tensor.elements_of_rows(tp_size)
        module = name.split(".")[-2]
        if module in _KV_MODULES:
            return tensor.num_elements * self.config.kv_heads_per_rank(tp_size) // self.config.num_kv_heads
        is_row_parallel_bias = module in ("o_proj", "down_proj") and name.endswith(".bias")
        if module in _SHARDED_MODULES and not is_row_parallel_bias:
            return tensor.num_elements // tp_size
        return tensor.num_elements


def find_model(model: str, relative_to: Path) -> Path:
    """The folder that `model` names: a path (relative ones start at `relative_to`) or a hub id in the local cache.

    Nothing is downloaded: a deployment must not fail, or change, because a hub did. Raises LoadError.
    """
    remedy = "give a folder in Hugging Face layout, or a hub id"
    try:
        path = (relative_to / Path(model).expanduser()).resolve()
        if path.is_dir():
            return path
        cached = _cached_snapshot(model)
    except LoadError:
        raise
    except RuntimeError as err:  # pathlib's way to say that "~somebody" is nobody, or that links lead in a circle
        problem = "starts with ~ and a user that does not exist" if model.startswith("~") else "is a circle of links"
        raise LoadError(problem, "write the path out") from err
    except ValueError as err:  # characters that no file name has
        raise LoadError(f"cannot be a path: {err}", remedy) from err
    except OSError as err:
        raise LoadError(f"cannot be opened: {err.strerror}", remedy) from err
    if cached is not None:
        return cached
    if not _may_be_hub_id(model):
        raise LoadError(f"there is no such folder: {path}", remedy)
    raise LoadError(
        f"neither a folder ({path}) nor a model in the Hugging Face cache ({_hub_cache()})",
        f"run: hf download {model}",
    )


def _may_be_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached_snapshot(model: str) -> Path | None:
    if not _may_be_hub_id(model):
        return None
    repository = _hub_cache() / f"models--{model.replace('/', '--')}"
    main = repository / "refs" / "main"
    if not main.is_file():
        return None
    snapshot = repository / "snapshots" / read_text(main).strip()
    return snapshot if snapshot.is_dir() else None


def read_model_folder(path: Path, *, dtype: str | None = None) -> ModelFolder:
    """Read the facts of a folder. `dtype`: what the weights are to be loaded as, if not the checkpoint's own.

    Raises LoadError for what is missing, broken or not supported: a worker can load what is accepted here.
    """
    raw = read_config_json(path)
    config = parse_config(raw)
    weights = read_weights(path, config)
    return ModelFolder(
        path=path,
        config=config,
        dtype=dtype or _own_dtype(Fields("config.json", raw), weights),
        eos=read_eos_tokens(path, load_tokenizer(path), config.vocab_size),
        weights=weights,
    )


def _own_dtype(config: Fields, weights: Mapping[str, TensorInfo]) -> str:
    """The config's dtype (older files call it torch_dtype), else that of the weights."""
    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    named = config.get(key)
    if named is None or named == "auto":
        return WEIGHT_DTYPES[weights[EMBEDDING].dtype]
    if not isinstance(named, str) or named not in _DTYPE_BYTES:
        raise config.unsupported(key, f"set dtype in the deployment file to one of {', '.join(_DTYPE_BYTES)}")
    return named
