"""The inputs of a row's choice besides its logits: the keys of its noise and its temperature."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.native.sampling import ROW_SETTINGS, RowSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseKeys:
    """What decides the noise of a row besides the token. All int64 [num_rows]."""

    seeds: Tensor  # the 64 bits of an unsigned seed
    sample_indices: Tensor  # j of n samples of one request
    positions: Tensor  # absolute position of the token to be chosen

    def select(self, rows: Tensor) -> "NoiseKeys":
        return NoiseKeys(
            seeds=self.seeds[rows], sample_indices=self.sample_indices[rows], positions=self.positions[rows]
        )


def row_settings(temperature: Tensor, keys: NoiseKeys, thresholds: Tensor | None) -> RowSettings:
    """The same for the native kernels; all tensors [num_rows] on the CPU."""
    settings = np.empty(temperature.shape[0], ROW_SETTINGS)
    settings["seed"], settings["sample_index"], settings["position"] = keys.seeds, keys.sample_indices, keys.positions
    settings["temperature"] = temperature
    settings["threshold"] = -np.inf if thresholds is None else thresholds
    settings["top_k"], settings["top_p"], settings["log_min_p"] = 0, 1, -np.inf
    return settings


def scale_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [num_rows, num_tokens] / temperature [num_rows]; rows of temperature 0 stay as they are."""
    # Dividing a tensor by a scalar may multiply by the scalar's rounded reciprocal; dividing by a tensor never does.
    return logits / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
