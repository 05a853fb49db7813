"""Safetensors files of a model folder: which tensors there are, and reading slices of them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open

from workers.layers.context import WeightSlice
from workers.models.errors import LoadError

_DTYPES = ("F32", "F16", "BF16")
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_MAX_NAMES_IN_ERROR = 5

Progress = Callable[[int, int], None]  # bytes done, bytes in total


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "BF16"


class Checkpoint:
    """The tensors of a folder by name. Opening reads the headers only and finds truncated files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(folder):
            for name, info in _read_header(file):
                if name in self.tensors:
                    raise LoadError(
                        f"tensor {name} is in {self.tensors[name].file.name} and in {file.name} of {folder}"
                    )
                self.tensors[name] = info

    def check(self, slices: Sequence[WeightSlice], *, unused: Callable[[str], bool]) -> None:
        """Raises LoadError unless the checkpoint has every tensor that `slices` read, in the expected shape and a
        readable dtype, and no other but those that `unused` accepts by name."""
        wanted = {part.name for part in slices}
        missing = sorted(wanted - self.tensors.keys())
        if missing:
            raise LoadError(
                f"{self.folder}: {_some(missing)} not in the checkpoint, but config.json asks for it: is a file "
                f"missing, or a feature (tie_word_embeddings, a bias) set wrongly in config.json?"
            )
        extra = sorted(name for name in self.tensors.keys() - wanted if not unused(name))
        if extra:
            raise LoadError(
                f"{self.folder}: the checkpoint holds {_some(extra)}, which the architecture of config.json does not "
                f"use; serving without it would give wrong results: is config.json that of another model?"
            )
        for part in slices:
            self._check_tensor(part)

    def _check_tensor(self, part: WeightSlice) -> None:
        info = self.tensors[part.name]
        if info.shape != part.full_shape:
            raise LoadError(
                f"{info.file}: tensor {part.name} has shape {list(info.shape)}, config.json makes it "
                f"{list(part.full_shape)}: config.json and weights are not of the same model"
            )
        if info.dtype not in _DTYPES:
            raise LoadError(
                f"{info.file}: tensor {part.name} is {info.dtype}, supported are {', '.join(_DTYPES)}; quantised "
                f"checkpoints are not supported yet"
            )

    def read(self, slices: Sequence[WeightSlice], progress: Progress) -> None:
        """Fills the targets, converting to their dtype. Reads nothing but the slices; each file is opened once."""
        total = sum(part.target.nbytes for part in slices)
        done = 0
        progress(0, total)
        by_file = sorted(slices, key=lambda part: self.tensors[part.name].file)
        for file, parts in groupby(by_file, key=lambda part: self.tensors[part.name].file):
            with safe_open(file, framework="pt") as opened:
                for part in parts:
                    part.target.copy_(_narrow(opened.get_slice(part.name), part))
                    done += part.target.nbytes
                    progress(done, total)


def _narrow(tensor: Any, part: WeightSlice) -> Any:
    stop = part.start + part.target.shape[part.dim]
    return tensor[(slice(None),) * part.dim + (slice(part.start, stop),)]


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES_IN_ERROR
    listed = ", ".join(names[:_MAX_NAMES_IN_ERROR]) + (f" and {more} more" if more > 0 else "")
    return f"tensor {listed}" if len(names) == 1 else f"tensors {listed}"


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
