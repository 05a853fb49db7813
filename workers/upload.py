"""Small tensors for a device that is still busy with earlier work."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(numbers: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers. Does not wait. `torch.tensor(numbers, device=device)` returns only when the device has
    finished all earlier work, and would leave it idle while the next kernels are launched."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
