"""Which tensors the safetensors files of a folder hold: read from their headers, so truncated files are found, too."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from checkpoint.errors import LoadError, shown
from checkpoint.json_files import read_json_object, refuse_special_file

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_AGAIN = "download it again"
# Bits of an element, of every type that the safetensors library reads.
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "BF16"
    start: int  # of its data in the file, in bytes
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def elements_of_rows(self, num_ranks: int) -> int:
        """On the fullest of ranks that share the rows: those of a vocabulary need not divide evenly."""
        return -(-self.shape[0] // num_ranks) * math.prod(self.shape[1:])


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder by name. Raises LoadError for files that are missing, damaged or truncated."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in _read_header(file).items():
            if name in tensors:
                both = f"{tensors[name].file.name} and in {file.name} of {folder}"
                raise LoadError(f"tensor {shown(name)} is in {both}", "remove the file that is left over")
            tensors[name] = info
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them; others in the folder are left alone."""
    if (folder / _SINGLE_FILE).exists():
        return [folder / _SINGLE_FILE]
    index = folder / _INDEX_FILE
    if index.exists():
        return [folder / name for name in _indexed_files(index)]
    if list(folder.glob("pytorch_model*.bin")):
        raise LoadError(
            f"{folder} has weights in pytorch_model*.bin (pickle) only",
            "convert them to safetensors, for instance by loading and saving the model with transformers",
        )
    raise LoadError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}", "download the weights into it")


def _indexed_files(index: Path) -> list[str]:
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise LoadError(
            f"{index}: weight_map must be an object of tensor names and file names, got {shown(files)}", _AGAIN
        )
    names = sorted(set(files.values()))
    for name in names:
        if not _is_file(index.parent, name):
            raise LoadError(f"{index}: weight_map names {shown(name)}, which is not there", "download that file again")
    return names


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (ValueError, OSError):  # NUL, or too long
        return False


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """8 bytes of header length, the header as JSON, then the data."""
    refuse_special_file(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > _MAX_HEADER_BYTES:
                raise LoadError(f"{file} is not a safetensors file (a Git LFS pointer?): it has {size} bytes", _AGAIN)
            text = stream.read(length)
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}", _AGAIN) from error
    if len(text) < length:
        raise LoadError(f"{file} is truncated: its header needs {8 + length} bytes, the file has {size}", _AGAIN)
    tensors = _parse_header(file, text)
    _check_layout(
        file, sorted(tensors.values(), key=lambda info: (info.start, info.num_bytes)), data_start=8 + length, size=size
    )
    return tensors


def _parse_header(file: Path, text: bytes) -> dict[str, TensorInfo]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition, parse_constant=_no_json)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file} has a damaged header: {error}", _AGAIN) from error
    if not isinstance(header, dict):
        raise LoadError(f"{file} has a damaged header: it is a {type(header).__name__}, not an object", _AGAIN)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise LoadError(f"{file} has a damaged header: __metadata__ is {shown(metadata)}, not text by name", _AGAIN)
    return {name: _tensor_info(file, name, entry, data_start=8 + len(text)) for name, entry in header.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is given twice, json would keep the last one and the safetensors library perhaps another."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _tensor_info(file: Path, name: str, entry: Any, *, data_start: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise LoadError(
            f"{file} has a damaged header: tensor {shown(name)} must have dtype, shape and data_offsets, got "
            f"{shown(entry)}",
            _AGAIN,
        )
    start, end = offsets
    bits = _DTYPE_BITS.get(dtype)
    if bits is None:
        raise LoadError(
            f"{file}: tensor {shown(name)} is of the unknown type {shown(dtype)}", "use unquantised weights"
        )
    if bits * math.prod(shape) != 8 * (end - start):
        raise LoadError(
            f"{file} has a damaged header: tensor {shown(name)} of {dtype} {shown(shape)} takes "
            f"{bits * math.prod(shape) // 8} bytes, its data_offsets are {shown(offsets)}",
            _AGAIN,
        )
    return TensorInfo(file=file, shape=tuple(shape), dtype=dtype, start=data_start + start, num_bytes=end - start)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(file: Path, in_order: Sequence[TensorInfo], *, data_start: int, size: int) -> None:
    """Tensors are adjacent, without gaps, and fill the file."""
    end = data_start
    for info in in_order:
        if info.start != end:
            raise LoadError(f"{file} has a damaged header: tensors overlap or leave a gap at byte {end}", _AGAIN)
        end += info.num_bytes
    if size != end:
        state = "is truncated" if size < end else "has bytes after its data"
        raise LoadError(f"{file} {state}: {end} bytes expected, {size} found", _AGAIN)
