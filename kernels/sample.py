"""Choosing one token for each row of logits with noise that depends on (seed, sample, position, token) alone.

The token is argmax_v(logits_v / temperature + noise_v), the lowest id among equals, with Gumbel noise
(kernels/gumbel.py): an exact draw from softmax(logits / temperature), and the same token for the same logits whoever
asks, in whatever batch. At temperature 0 it is the plain argmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gumbel import NOISE_MAX, NOISE_MIN, gumbel_noise, gumbel_noise_range

COLUMN_TILE = 64  # on CPU only tiles whose largest logit could win are looked into
# On CPU, above this share of such tiles a row's noise is computed for all tokens (one Philox call yields four), this
# many at a time: 0.8 ms on one AVX512 core, and twice that a token for a whole row of 128k, out of cache.
DENSE_SHARE = 1 / 4
NOISE_TILE = 1 << 15
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


def sample(logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int = 0) -> tuple[Tensor, Tensor]:
    """Chooses a token in each row of a vocabulary or of a shard of it.

    Args:
        logits: fp32 [num_rows, num_tokens]; -Inf excludes a token; no NaN.
        temperature: fp32 [num_rows]; 0 is greedy.
        keys: of the noise.
        first_token_id: the token of column 0.
    Returns:
        values: fp32 [num_rows], scaled logit plus noise of the winner; -Inf where every token is excluded.
        token_ids: int64 [num_rows]. Of the shards of a vocabulary, the largest value and of equal ones the lowest id
            is the choice in the whole vocabulary.
    """
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    implementation = sample_cpu if logits.device.type == "cpu" else sample_reference
    return implementation(logits, temperature, keys, first_token_id=first_token_id)


def sample_reference(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """`sample` in its plainest form: noise for every token."""
    noise = gumbel_noise_range(
        keys.seeds, keys.sample_indices, keys.positions, first_token_id=first_token_id, num_tokens=logits.shape[1]
    )
    noisy = (temperature > 0).unsqueeze(1)
    best = (scale_by_temperature(logits, temperature) + torch.where(noisy, noise, 0.0)).max(dim=1)
    return best.values, best.indices + first_token_id  # documented to be the first of equal maxima


def sample_cpu(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """`sample` with noise only for tokens that could win: the same result, bit for bit.

    Noise lies between NOISE_MIN and NOISE_MAX and rounding is monotone, so a token whose scaled logit plus NOISE_MAX is
    below the largest plus NOISE_MIN, both as rounded, cannot even tie.
    """
    noisy = temperature > 0
    reach = torch.where(noisy, NOISE_MAX, 0.0).unsqueeze(1)
    starts, tile_max = _column_tiles(logits)
    tile_max = scale_by_temperature(tile_max, temperature)  # division is monotone: the largest of the scaled logits
    # At or above the lowest number, so that -Inf is no candidate.
    threshold = (tile_max.amax(dim=1, keepdim=True) + torch.where(noisy, NOISE_MIN, 0.0).unsqueeze(1)).clamp(min=LOWEST)
    hot = tile_max + reach >= threshold  # [num_rows, num_tiles]
    dense_rows = (hot.sum(dim=1) > DENSE_SHARE * len(starts)).nonzero().squeeze(1)
    hot[dense_rows] = False

    tile_row, tile = hot.nonzero(as_tuple=True)
    columns = starts[tile].unsqueeze(1) + torch.arange(min(COLUMN_TILE, logits.shape[1]))  # [num_hot_tiles, tile size]
    scaled = scale_by_temperature(logits[tile_row.unsqueeze(1), columns], temperature[tile_row])
    picked = (scaled + reach[tile_row] >= threshold[tile_row]).nonzero(as_tuple=True)
    row, column = tile_row[picked[0]], columns[picked]  # [num_candidates]
    noise_keys = keys.select(row)
    noise = gumbel_noise(noise_keys.seeds, noise_keys.sample_indices, noise_keys.positions, column + first_token_id)
    values, token_ids = _best_of_rows(
        row, column, scaled[picked] + torch.where(noisy[row], noise, 0.0), num_rows=logits.shape[0]
    )
    token_ids += first_token_id
    for rows in torch.split(dense_rows, max(1, NOISE_TILE // logits.shape[1])):
        values[rows], token_ids[rows] = _sample_densely(
            logits[rows], temperature[rows], keys.select(rows), first_token_id=first_token_id
        )
    return values, token_ids


def _column_tiles(logits: Tensor) -> tuple[Tensor, Tensor]:
    """First columns [num_tiles] of tiles that cover a row, and the largest logit of each [num_rows, num_tiles].

    Where the row is no multiple of the tile, the last tile overlaps the one before.
    """
    num_tokens = logits.shape[1]
    if num_tokens <= COLUMN_TILE:
        return torch.zeros(1, dtype=torch.int64), logits.amax(dim=1, keepdim=True)
    starts = torch.arange(0, num_tokens - COLUMN_TILE + 1, COLUMN_TILE)
    tile_max = logits.unfold(1, COLUMN_TILE, COLUMN_TILE).amax(dim=2)
    if num_tokens % COLUMN_TILE:
        last = num_tokens - COLUMN_TILE
        starts = torch.cat((starts, torch.tensor([last])))
        tile_max = torch.cat((tile_max, logits[:, last:].amax(dim=1, keepdim=True)), dim=1)
    return starts, tile_max


def _best_of_rows(row: Tensor, column: Tensor, values: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """Largest value of each row and the lowest column that has it, of candidates [num_candidates] in any order.

    A row without candidates gets -Inf and column 0.
    """
    best = torch.full((num_rows,), -torch.inf).scatter_reduce(0, row, values, "amax")
    wins = values == best[row]
    no_column = torch.iinfo(torch.int64).max
    columns = torch.full((num_rows,), no_column).scatter_reduce(0, row[wins], column[wins], "amin")
    return best, torch.where(columns == no_column, 0, columns)


def _sample_densely(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int
) -> tuple[Tensor, Tensor]:
    """`sample_reference` over parts of the vocabulary, so that its dozens of temporaries stay in the cache."""
    parts = [
        sample_reference(part, temperature, keys, first_token_id=first_token_id + index * NOISE_TILE)
        for index, part in enumerate(torch.split(logits, NOISE_TILE, dim=1))
    ]
    best = torch.stack([values for values, _ in parts]).max(dim=0)  # the first, hence lowest, of equal maxima
    token_ids = torch.stack([token_ids for _, token_ids in parts])
    return best.values, token_ids.gather(0, best.indices.unsqueeze(0)).squeeze(0)
