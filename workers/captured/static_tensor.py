"""Tensors at addresses that never change, for captured steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StaticTensor:
    """A tensor on a device, and host memory through which it is filled. That is pinned, so copies need no wait."""

    staged: Tensor
    there: Tensor

    @classmethod
    def zeros(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> "StaticTensor":
        staged = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        return cls(staged, torch.zeros(shape, dtype=dtype, device=device))

    def fill(self, values: Tensor | Sequence[float], num_rows: int, *, padding: float) -> None:
        """Give the first rows these values, and the rows after them `padding`, up to `num_rows`."""
        count = len(values)
        self.staged[:count] = torch.as_tensor(values)
        self.staged[count:num_rows] = padding
        self._upload(num_rows)

    def fill_columns(self, values: Tensor, num_rows: int) -> None:
        """As `fill` for the first columns of values [rows, columns]; the others and the padding keep what they hold."""
        self.staged[: values.shape[0], : values.shape[1]] = values
        self._upload(num_rows)

    def _upload(self, num_rows: int) -> None:
        self.there[:num_rows].copy_(self.staged[:num_rows], non_blocking=True)


class Uploads:
    """Knows when the device has read what was staged, so that it may be overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Wait until earlier uploads are over. They nearly always are: a round ends with reading its results."""
        if self._read is not None:
            self._read.synchronize()

    def end(self) -> None:
        if self._read is not None:
            self._read.record(torch.cuda.current_stream(self._device))
