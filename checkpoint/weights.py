"""The tensors that a decoder loads from a folder: which there must be, in which shapes, and whether they are there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from checkpoint.config import ModelConfig
from checkpoint.errors import LoadError, shown
from checkpoint.stored_matrices import StoredMatrix, join_matrices
from checkpoint.tensors import TensorInfo, read_tensors

HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
WEIGHT_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_MAX_NAMES_IN_ERROR = 5
_CHUNK_BYTES = 1 << 20

Shape = tuple[int, ...]


def read_weights(folder: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """The tensors that make up the model, by name: all that the config asks for, and no other.

    Planner and workers both start here, so what one accepts the other can load. Raises LoadError for files that are
    damaged, and for tensors that are missing, of another shape or type, or of no use to the config.
    """
    tensors = read_tensors(folder)
    expected = dict(expected_tensors(config))
    if config.stored_as is not None:
        matrices = {name: shape for name, shape in expected.items() if len(shape) == 2 and name != EMBEDDING}
        tensors = join_matrices(tensors, matrices, config.stored_as)
    _check_names(folder, tensors, expected, tied=config.tie_word_embeddings)
    for name, shape in expected.items():
        _check_tensor(name, tensors[name], shape)
    if config.tie_word_embeddings and HEAD in tensors:
        _check_copy(tensors[HEAD], of=tensors[EMBEDDING])
    return {name: tensors[name] for name in expected}


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of a model. Those of a layer differ between families only as the config says."""
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        for name, shape in _layer_tensors(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_size, config.hidden_size)


def _layer_tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield from _linear("self_attn.q_proj", q, hidden, bias=config.qkv_bias)
    yield from _linear("self_attn.k_proj", kv, hidden, bias=config.qkv_bias)
    yield from _linear("self_attn.v_proj", kv, hidden, bias=config.qkv_bias)
    yield from _linear("self_attn.o_proj", hidden, q, bias=config.o_bias)
    yield from _linear("mlp.gate_proj", mlp, hidden, bias=config.mlp_bias)
    yield from _linear("mlp.up_proj", mlp, hidden, bias=config.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, mlp, bias=config.mlp_bias)


def _linear(name: str, out_features: int, in_features: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _check_names(folder: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, Shape], *, tied: bool) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise LoadError(
            f"{folder}: {_some(missing)} not in the checkpoint, but config.json asks for it",
            "download missing files, or correct config.json (num_hidden_layers, tie_word_embeddings, a bias)",
        )
    extra = sorted(name for name in tensors.keys() - expected.keys() if not _has_no_effect(name, tied=tied))
    if extra:
        raise LoadError(
            f"{folder}: the checkpoint holds {_some(extra)}, which the architecture of config.json does not use: "
            f"serving without it would give wrong results",
            "use config.json and weights of the same model, and one of a supported architecture",
        )


def _has_no_effect(name: str, *, tied: bool) -> bool:
    """Frequencies that older versions of transformers saved, and a copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == HEAD)


def _check_tensor(name: str, info: TensorInfo, shape: Shape) -> None:
    if isinstance(info, StoredMatrix):
        return  # its parts were checked when they were joined
    if info.dtype not in WEIGHT_DTYPES:
        raise LoadError(
            f"{info.file}: tensor {name} is {info.dtype}, supported are {', '.join(WEIGHT_DTYPES)}",
            "use unquantised weights, or those of a format that config.json names in quantization_config",
        )
    if info.shape != shape:
        raise LoadError(
            f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json makes it {list(shape)}",
            "use config.json and weights of the same model",
        )


def _check_copy(head: TensorInfo, *, of: TensorInfo) -> None:
    """A head saved despite `tie_word_embeddings: true` must equal the embedding, else one of the two is wrong."""
    is_alike = (head.shape, head.dtype) == (of.shape, of.dtype)
    if not is_alike or any(ours != theirs for ours, theirs in zip(_data(head), _data(of), strict=True)):
        raise LoadError(
            f"{head.file}: config.json says tie_word_embeddings, but {HEAD} differs from the embedding",
            "set tie_word_embeddings to false if the head is meant, or remove the tensor",
        )


def _data(info: TensorInfo) -> Iterator[bytes]:
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        for done in range(0, info.num_bytes, _CHUNK_BYTES):
            yield stream.read(min(_CHUNK_BYTES, info.num_bytes - done))


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES_IN_ERROR
    listed = ", ".join(shown(name)[1:-1] for name in names[:_MAX_NAMES_IN_ERROR])
    listed += f" and {more} more" if more > 0 else ""
    return f"tensor {listed}" if len(names) == 1 else f"tensors {listed}"
