"""Which tensors make up a matrix that is stored in few bits, and whether they are there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from checkpoint.errors import LoadError
from checkpoint.stored_format import StoredFormat
from checkpoint.tensors import TensorInfo

_WORDS: Final = ("I32",)
_FLOATS: Final = ("F16", "BF16", "F32")
_CODES: Final = ("I8", "F8_E4M3")
_WORD_BITS = 32
_NOT_READ: Final = ("weight_shape", "input_scale", "activation_scale")  # activations are not rounded here

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix(TensorInfo):
    """A matrix [out_features, in_features], its `shape`, in several tensors. `num_bytes`: of all of them."""

    format: StoredFormat
    parts: Mapping[str, tuple[str, TensorInfo]]  # by the end of the name: the name, and where it is


@dataclass(frozen=True, slots=True)
class _Part:
    shape: Shape
    dtypes: tuple[str, ...]
    is_optional: bool = False


def join_matrices(
    tensors: Mapping[str, TensorInfo], matrices: Mapping[str, Shape], format: StoredFormat
) -> dict[str, TensorInfo]:
    """`tensors`, where the parts of each stored matrix have become one entry under the matrix's name. Those of
    `matrices`, shapes by name, that are not stored in few bits stay as they are. Raises LoadError."""
    joined = dict(tensors)
    for name, (out_features, in_features) in matrices.items():
        prefix = name.removesuffix("weight")
        wanted = _parts(format, out_features, in_features)
        codes = tensors.get(prefix + next(iter(wanted)))
        if codes is None or codes.dtype not in next(iter(wanted.values())).dtypes:
            continue
        parts = _find(tensors, prefix, wanted)
        for end in (*wanted, *_NOT_READ):
            joined.pop(prefix + end, None)
        joined[name] = StoredMatrix(
            file=codes.file,
            shape=(out_features, in_features),
            dtype=format.name,
            start=codes.start,
            num_bytes=sum(info.num_bytes for _, info in parts.values()),
            format=format,
            parts=parts,
        )
    return joined


def _find(
    tensors: Mapping[str, TensorInfo], prefix: str, wanted: Mapping[str, _Part]
) -> dict[str, tuple[str, TensorInfo]]:
    found = {}
    for end, part in wanted.items():
        info = tensors.get(prefix + end)
        if info is None and part.is_optional:
            continue
        if info is None:
            raise LoadError(f"tensor {prefix}{end} is not in the checkpoint", "download missing files")
        if info.dtype not in part.dtypes or _squeezed(info.shape) != _squeezed(part.shape):
            raise LoadError(
                f"{info.file}: tensor {prefix}{end} is {info.dtype} {list(info.shape)}, config.json makes it "
                f"{' or '.join(part.dtypes)} {list(part.shape)}",
                "use config.json and weights of the same model",
            )
        found[end] = (prefix + end, info)
    return found


def _squeezed(shape: Shape) -> Shape:
    """A single scale may be stored with one dimension, two or none."""
    return tuple(size for size in shape if size != 1)


def _parts(format: StoredFormat, out_features: int, in_features: int) -> dict[str, _Part]:
    """By the ends of their names, the codes first."""
    in_words = _words(in_features, format.num_bits)
    out_words = _words(out_features, format.num_bits)
    rows, columns = format.scale_shape(out_features, in_features)
    order = _Part((in_features,), _WORDS, is_optional=True)
    match format.layout:
        case "packed":
            parts = {
                "weight_packed": _Part((out_features, in_words), _WORDS),
                format.scale: _Part((rows, columns), _FLOATS),
                "weight_g_idx": order,
            }
            if format.has_zero_points:
                parts["weight_zero_point"] = _Part((out_words, columns), _WORDS)
            return parts
        case "plain":
            return {
                "weight": _Part((out_features, in_features), _CODES),
                format.scale: _Part((rows, columns), _FLOATS),
            }
        case "gptq":
            return {
                "qweight": _Part((in_words, out_features), _WORDS),
                format.scale: _Part((columns, out_features), _FLOATS),
                "qzeros": _Part((columns, out_words), _WORDS),
                "g_idx": order,
            }
    return {
        "qweight": _Part((in_features, out_words), _WORDS),
        format.scale: _Part((columns, out_features), _FLOATS),
        "qzeros": _Part((columns, out_words), _WORDS),
    }


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // _WORD_BITS)
