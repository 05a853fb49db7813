"""Choosing one token for each row of logits with noise that depends on (seed, sample, position, token) alone.

The token is argmax_v(logits_v / temperature + noise_v), the lowest id among equals, with Gumbel noise
(kernels/gumbel.py): an exact draw from softmax(logits / temperature), and the same token for the same logits whoever
asks, in whatever batch. At temperature 0 it is the plain argmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gumbel import NOISE_MAX, NOISE_MIN, gumbel_noise, gumbel_noise_range

# On CPU, above this share of the vocabulary a row's noise is computed for all tokens (one Philox call yields four) in
# tiles of this many: 0.8 ms each on one AVX512 core, against twice that for a whole row of 128k, out of cache.
DENSE_SHARE = 1 / 16
TILE_TOKENS = 1 << 15
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseKeys:
    """What the noise of a row depends on besides the token. All int64 [num_rows]."""

    seeds: Tensor  # the 64 bits of an unsigned seed
    sample_indices: Tensor  # j of n samples of one request
    positions: Tensor  # absolute position of the token to be chosen

    def select(self, rows: Tensor) -> "NoiseKeys":
        return NoiseKeys(
            seeds=self.seeds[rows], sample_indices=self.sample_indices[rows], positions=self.positions[rows]
        )


def scale_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [num_rows, num_tokens] / temperature [num_rows]; rows of temperature 0 stay as they are."""
    # A tensor divided by a scalar may be multiplied by its rounded reciprocal instead; a tensor by a tensor never is.
    return logits / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)


def sample(
    scaled_logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Chooses a token in each row of a vocabulary or of a shard of it.

    Args:
        scaled_logits: fp32 [num_rows, num_tokens], divided by the temperature; -Inf excludes a token; no NaN.
        temperature: fp32 [num_rows]; 0 is greedy.
        keys: of the noise.
        first_token_id: the token of column 0.
    Returns:
        values: fp32 [num_rows], scaled logit plus noise of the winner; -Inf where every token is excluded.
        token_ids: int64 [num_rows]. Of the shards of a vocabulary, the largest value and of equal ones the lowest id
            is the choice in the whole vocabulary.
    """
    if scaled_logits.dtype != torch.float32:
        raise TypeError(f"scaled_logits must be float32, got {scaled_logits.dtype}")
    implementation = sample_cpu if scaled_logits.device.type == "cpu" else sample_reference
    return implementation(scaled_logits, temperature, keys, first_token_id=first_token_id)


def sample_reference(
    scaled_logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """`sample` in its plainest form: noise for every token."""
    noise = gumbel_noise_range(
        keys.seeds,
        keys.sample_indices,
        keys.positions,
        first_token_id=first_token_id,
        num_tokens=scaled_logits.shape[1],
    )
    values = scaled_logits + torch.where((temperature > 0).unsqueeze(1), noise, 0.0)
    best = values.max(dim=1)  # documented to give the first of equal maxima
    return best.values, best.indices + first_token_id


def sample_cpu(
    scaled_logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """`sample` with noise only for tokens that could win: the same result, bit for bit.

    Noise lies between NOISE_MIN and NOISE_MAX and rounding is monotone, so a token whose logit plus NOISE_MAX is below
    the largest logit plus NOISE_MIN, both as rounded, cannot even tie.
    """
    noisy = temperature > 0
    largest = scaled_logits.amax(dim=1)
    threshold = (largest + torch.where(noisy, NOISE_MIN, 0.0)).clamp(min=LOWEST)  # -Inf is never a candidate
    could_win = scaled_logits + torch.where(noisy, NOISE_MAX, 0.0).unsqueeze(1) >= threshold.unsqueeze(1)
    num_candidates = could_win.view(torch.uint8).sum(dim=1, dtype=torch.int32)  # [num_rows]
    dense = num_candidates > DENSE_SHARE * scaled_logits.shape[1]
    dense_rows = dense.nonzero().squeeze(1)
    could_win[dense_rows] = False
    row, column = could_win.nonzero(as_tuple=True)  # [num_candidates], by row, then by token

    candidate_keys = keys.select(row)
    noise = gumbel_noise(
        candidate_keys.seeds, candidate_keys.sample_indices, candidate_keys.positions, column + first_token_id
    )
    candidate_values = scaled_logits[row, column] + torch.where(noisy[row], noise, 0.0)
    values = torch.full_like(largest, -torch.inf).scatter_reduce(0, row, candidate_values, "amax")
    wins = candidate_values == values[row]
    no_token = torch.iinfo(torch.int64).max
    columns = torch.full_like(keys.positions, no_token).scatter_reduce(0, row[wins], column[wins], "amin")
    token_ids = torch.where(columns == no_token, 0, columns) + first_token_id
    for rows in torch.split(dense_rows, max(1, TILE_TOKENS // scaled_logits.shape[1])):
        values[rows], token_ids[rows] = _sample_tiled(
            scaled_logits[rows], temperature[rows], keys.select(rows), first_token_id=first_token_id
        )
    return values, token_ids


def _sample_tiled(
    scaled_logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int
) -> tuple[Tensor, Tensor]:
    """`sample_reference` over tiles of the vocabulary, so that its dozens of temporaries stay in the cache."""
    tiles = [
        sample_reference(tile, temperature, keys, first_token_id=first_token_id + index * TILE_TOKENS)
        for index, tile in enumerate(torch.split(scaled_logits, TILE_TOKENS, dim=1))
    ]
    best = torch.stack([values for values, _ in tiles]).max(dim=0)  # the first, hence lowest, of equal maxima
    token_ids = torch.stack([token_ids for _, token_ids in tiles])
    return best.values, token_ids.gather(0, best.indices.unsqueeze(0)).squeeze(0)
