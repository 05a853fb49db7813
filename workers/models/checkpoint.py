"""Safetensors files of a model folder: which tensors there are, and reading slices of them."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open

from checkpoint.errors import LoadError
from checkpoint.tensors import read_tensors
from workers.layers.context import WeightSlice

_DTYPES = ("F32", "F16", "BF16")
_MAX_NAMES_IN_ERROR = 5

Progress = Callable[[int, int], None]  # bytes done, bytes in total


class Checkpoint:
    """The tensors of a folder by name. Opening reads the headers only and finds truncated files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_tensors(folder)

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
