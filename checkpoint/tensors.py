"""Which tensors the safetensors files of a folder hold: read from their headers, so truncated files are found, too."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import LoadError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "BF16"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder by name. Raises LoadError for files that are missing, damaged or truncated."""
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        for name, info in _read_header(file):
            if name in tensors:
                raise LoadError(f"tensor {name} is in {tensors[name].file.name} and in {file.name} of {folder}")
            tensors[name] = info
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE_FILE).exists():
        return [folder / _SINGLE_FILE]
    index = folder / _INDEX_FILE
    if not index.exists():
        if list(folder.glob("pytorch_model*.bin")):
            raise LoadError(
                f"{folder} has weights in pytorch_model*.bin (pickle) only: convert them to safetensors, for instance "
                f"by loading and saving the model with transformers"
            )
        raise LoadError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise LoadError(f"{folder}: {index.name} names {', '.join(missing)}, which is not there: download it again")
    return [folder / name for name in names]


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Name, shape and dtype of each tensor: 8 bytes of header length, the header as JSON, then the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise LoadError(f"{file} is not a safetensors file (a Git LFS pointer?): it has {size} bytes")
        text = stream.read(length)
    if len(text) < length:
        raise LoadError(f"{file} is truncated: its header needs {8 + length} bytes, the file has {size}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{file} has a damaged header: {type(error).__name__}: {error}") from error
    if size != 8 + length + data_bytes:
        state = "is truncated" if size < 8 + length + data_bytes else "has bytes behind its data"
        raise LoadError(f"{file} {state}: {8 + length + data_bytes} bytes expected, {size} found: download it again")
    for name, entry in header.items():
        yield name, TensorInfo(file=file, shape=tuple(entry["shape"]), dtype=entry["dtype"])
