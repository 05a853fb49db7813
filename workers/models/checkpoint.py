"""Reading slices of the tensors of a model folder."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open

from checkpoint.config import ModelConfig
from checkpoint.weights import read_weights
from workers.layers.context import WeightSlice

Progress = Callable[[int, int], None]  # bytes done, bytes in total


class Checkpoint:
    """The weights of a model. Opening reads only the headers and checks them against the config; raises LoadError."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self._weights = read_weights(folder, config)

    def read(self, slices: Sequence[WeightSlice], progress: Progress) -> None:
        """Fill the targets, converting to their dtype. Reads only the slices; each file is opened once."""
        total = sum(part.target.nbytes for part in slices)
        done = 0
        progress(0, total)
        by_file = sorted(slices, key=lambda part: self._weights[part.name].file)
        for file, parts in groupby(by_file, key=lambda part: self._weights[part.name].file):
            with safe_open(file, framework="pt") as opened:
                for part in parts:
                    assert self._weights[part.name].shape == part.full_shape, f"checkpoint.weights on {part.name}"
                    part.target.copy_(_narrow(opened.get_slice(part.name), part))
                    done += part.target.nbytes
                    progress(done, total)


def _narrow(tensor: Any, part: WeightSlice) -> Any:
    stop = part.start + part.target.shape[part.dim]
    return tensor[(slice(None),) * part.dim + (slice(part.start, stop),)]
