"""What the control plane must know of a model: read from its folder without torch or transformers.

Shapes come from the safetensors headers (8 bytes of length, then JSON), so the memory plan counts the tensors that
are there, not those that a formula expects.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_SAFETENSORS_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_MAX_HEADER_BYTES: Final = 100_000_000  # what the safetensors library itself accepts
# Cut among tensor-parallel ranks; everything else (norms, biases of row-parallel layers) is held by each rank.
_SHARDED_MODULES: Final = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_KV_MODULES: Final = ("k_proj", "v_proj")


class ModelFolderError(ValueError):
    """A model folder lacks something or holds something that cannot be served. `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}")


class TensorInfo(NamedTuple):
    name: str
    dtype: str  # as in the header: "BF16"
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """The facts of one model folder in Hugging Face layout."""

    path: Path
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, padding included
    max_position_embeddings: int
    dtype: str  # "bfloat16" | "float16" | "float32"
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]
    tensors: tuple[TensorInfo, ...]

    def kv_heads_per_rank(self, tp_size: int) -> int:
        return max(1, self.num_kv_heads // tp_size)  # replicated where there are fewer heads than ranks

    def tensor_parallel_problem(self, tp_size: int) -> str | None:
        """Why this model cannot be cut into `tp_size` equal ranks, or None."""
        if self.num_q_heads % tp_size:
            return f"does not divide the model's {self.num_q_heads} attention heads"
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            return f"neither divides the model's {self.num_kv_heads} key-value heads nor is a multiple of them"
        if self.intermediate_size % tp_size:
            return f"does not divide the model's intermediate size {self.intermediate_size}"
        return None

    def possible_tp_sizes(self, limit: int = 64) -> list[int]:
        return [size for size in range(1, limit + 1) if self.tensor_parallel_problem(size) is None]

    def weight_bytes(self, tp_size: int, dtype: str) -> int:
        """Bytes of weights on one of `tp_size` ranks once they are loaded as `dtype`."""
        return sum(self._elements_per_rank(tensor, tp_size) for tensor in self.held_tensors) * DTYPE_BYTES[dtype]

    @property
    def held_tensors(self) -> Iterator[TensorInfo]:
        """Those that are loaded: a head that is the embedding is none of its own."""
        return (t for t in self.tensors if not (self.tied_embeddings and t.name.startswith("lm_head.")))

    def kv_bytes_per_token(self, tp_size: int, dtype: str) -> int:
        """Bytes of keys and values that one token takes on one rank."""
        return 2 * self.num_layers * self.kv_heads_per_rank(tp_size) * self.head_dim * DTYPE_BYTES[dtype]

    def activation_bytes(self, tp_size: int, dtype: str, *, num_tokens: int, num_logit_rows: int) -> int:
        """Estimate of the largest working set of one forward: the MLP of one layer, then the logits.

        A layer holds hidden states and residual, the fused query-key-value or gate-up product and its result; logits
        are fp32 shards, held twice while a token is chosen.
        """
        qkv = (self.num_q_heads // tp_size + 2 * self.kv_heads_per_rank(tp_size)) * self.head_dim
        mlp = 3 * self.intermediate_size // tp_size
        layer = num_tokens * (3 * self.hidden_size + max(2 * qkv, mlp)) * DTYPE_BYTES[dtype]
        logits = 2 * num_logit_rows * -(-self.vocab_size // tp_size) * 4
        return layer + logits

    def _elements_per_rank(self, tensor: TensorInfo, tp_size: int) -> int:
        module = tensor.name.split(".")[-2] if "." in tensor.name else ""
        if module in _KV_MODULES:
            return tensor.num_elements * self.kv_heads_per_rank(tp_size) // self.num_kv_heads
        is_row_parallel_bias = module in ("o_proj", "down_proj") and tensor.name.endswith(".bias")
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
        raise ModelFolderError("starts with ~ and a user that does not exist", "write the path out") from err
    if path.is_dir():
        return path
    looks_like_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise ModelFolderError(f"there is no such folder: {path}", "give a folder in Hugging Face layout, or a hub id")
    cached = _cached_snapshot(model)
    if cached is None:
        raise ModelFolderError(
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
    """Read the facts of a folder. Raises ModelFolderError for what is missing, broken or not supported."""
    config = _read_json(path / "config.json")
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise ModelFolderError(f"the checkpoint is quantised ({method})", "use unquantised weights: not built yet")
    generation = _read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    if not (path / "tokenizer.json").is_file():
        raise ModelFolderError("tokenizer.json is missing", "save the tokeniser in the fast format into the folder")
    num_q_heads = _positive_int(config, "num_attention_heads")
    hidden_size = _positive_int(config, "hidden_size")
    tensors = _read_tensors(path)
    return ModelFolder(
        path=path,
        model_type=str(config.get("model_type", "")),
        num_layers=_positive_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(config, "intermediate_size"),
        num_q_heads=num_q_heads,
        num_kv_heads=_positive_int(config, "num_key_value_heads", default=num_q_heads),
        head_dim=_positive_int(config, "head_dim", default=hidden_size // num_q_heads),
        vocab_size=_positive_int(config, "vocab_size"),
        max_position_embeddings=_positive_int(config, "max_position_embeddings"),
        dtype=_dtype(config, tensors),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(config, generation),
        tensors=tensors,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        remedy = "give a folder in Hugging Face layout (config.json, tokenizer.json, *.safetensors)"
        raise ModelFolderError(f"{path.name} is missing in {path.parent}", remedy) from err
    except (OSError, ValueError) as err:
        raise ModelFolderError(f"{path} cannot be read: {err}", "repair or copy the file again") from err
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} holds no JSON object", "repair or copy the file again")
    return value


def _positive_int(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelFolderError(f"config.json: {key} is {value!r}", "it must be a positive integer")
    return value


def _dtype(config: Mapping[str, Any], tensors: tuple[TensorInfo, ...]) -> str:
    """The config's dtype (older files call it torch_dtype), else that of the first tensor."""
    named = config.get("dtype") or config.get("torch_dtype") or _SAFETENSORS_DTYPES.get(tensors[0].dtype)
    if named not in DTYPE_BYTES:
        raise ModelFolderError(f"config.json: dtype is {named!r}", f"use one of {', '.join(DTYPE_BYTES)}")
    return str(named)


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins: chat models list there the tokens that end a turn."""
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _read_tensors(path: Path) -> tuple[TensorInfo, ...]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / name for name in _read_json(index).get("weight_map", {}).values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelFolderError(f"no *.safetensors in {path}", "convert the weights to safetensors or copy them again")
    return tuple(tensor for file in files for tensor in _read_header(file))


def _read_header(file: Path) -> list[TensorInfo]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        end = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"))
    except (OSError, struct.error, ValueError, KeyError, TypeError) as err:
        raise ModelFolderError(f"{file} is no readable safetensors file: {err}", "copy it again") from err
    if file.stat().st_size < end:
        raise ModelFolderError(f"{file} has {file.stat().st_size} bytes, its header promises {end}", "copy it again")
    return [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def compare_tokenizers(target: Path, draft: Path) -> str | None:
    """Why the two folders do not share a tokeniser, naming the first token that differs; None if they do.

    Only what changes the ids of a text counts. Rows of the embedding beyond the last token are padding and may differ.
    """
    first, second = _read_json(target / "tokenizer.json"), _read_json(draft / "tokenizer.json")
    if first == second:
        return None
    tokens, draft_tokens = _tokens_by_id(first), _tokens_by_id(second)
    for token_id in sorted(tokens.keys() | draft_tokens.keys()):
        ours, theirs = tokens.get(token_id), draft_tokens.get(token_id)
        if ours != theirs:
            return f"token {token_id} is {_quoted(ours)} in the target and {_quoted(theirs)} in the draft"
    for part in ("normalizer", "pre_tokenizer", "model"):
        if first.get(part) != second.get(part):
            return f"the tokens are equal, but tokenizer.json differs in {part!r}, so texts may split differently"
    return None


def _quoted(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _tokens_by_id(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        tokens = {token_id: str(entry[0]) for token_id, entry in enumerate(vocabulary)}
    else:
        tokens = {token_id: token for token, token_id in vocabulary.items()}
    tokens |= {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", [])}
    return tokens
