"""Reading slices of the tensors of a model folder."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open

from checkpoint.config import ModelConfig
from checkpoint.stored_matrices import StoredMatrix
from checkpoint.weights import read_weights
from kernels.layers.quantized import QuantizedWeight
from workers.layers.context import WeightSlice
from workers.models.stored_matrices import read_bits, read_stored_matrix

Progress = Callable[[int, int], None]  # bytes done, bytes in total


class Checkpoint:
    """The weights of a model. Opening reads only the headers and checks them against the config; raises LoadError."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self._weights = read_weights(folder, config)
        self.stored_names = frozenset(name for name, info in self._weights.items() if isinstance(info, StoredMatrix))

    def read(self, slices: Sequence[WeightSlice], on_bytes: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Fill the targets, converting to their dtype. Reads only the slices; each file is opened once. `on_bytes`:
        told the size of each target when it is filled."""
        stored = [part for part in slices if self._is_stored(part)]
        for part in stored:
            self._fill_stored(part)
            on_bytes(part.target.nbytes)
        rest = [part for part in slices if not self._is_stored(part)]
        by_file = sorted(rest, key=lambda part: self._weights[part.name].file)
        for file, parts in groupby(by_file, key=lambda part: self._weights[part.name].file):
            with safe_open(file, framework="pt") as opened:
                for part in parts:
                    assert self._weights[part.name].shape == part.full_shape, f"checkpoint.weights on {part.name}"
                    part.target.copy_(_narrow(opened.get_slice(part.name), part))
                    on_bytes(part.target.nbytes)

    def read_bits(self, part: WeightSlice, on_bytes: Callable[[int], None]) -> QuantizedWeight:
        """A slice of a matrix that is stored in few bits, in these bits. Tells `on_bytes` what `read` does. Raises
        LoadError."""
        matrix = self._weights[part.name]
        assert isinstance(matrix, StoredMatrix), "other matrices have all bits"
        on_bytes(part.target.nbytes)
        return read_bits(matrix, dim=part.dim, start=part.start, size=part.target.shape[part.dim])

    def _is_stored(self, part: WeightSlice) -> bool:
        return part.name in self.stored_names

    def _fill_stored(self, part: WeightSlice) -> None:
        """From a matrix in few bits, of which all is read: scales and order concern whole rows or columns."""
        matrix = self._weights[part.name]
        assert isinstance(matrix, StoredMatrix), "other tensors are read by slices"
        part.target.copy_(_narrow(read_stored_matrix(matrix), part))


def _narrow(tensor: Any, part: WeightSlice) -> Any:
    stop = part.start + part.target.shape[part.dim]
    return tensor[(slice(None),) * part.dim + (slice(part.start, stop),)]
