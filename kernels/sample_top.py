"""The best few tokens of each row in the order in which `sample` would choose them, were the better ones not there."""

import torch
from torch import Tensor

from kernels.gumbel import NOISE_MAX, NOISE_MIN, gumbel_noise, gumbel_noise_range
from kernels.sample import LOWEST, NoiseKeys, scale_by_temperature
from kernels.sort_key import ID_MASK, pack_sort_key, top_sort_keys, unpack_sort_key

COLUMN_TILE = 64  # on CPU only tiles whose largest logit could be among the best are looked into
EXCLUDED_KEY = int(pack_sort_key(torch.tensor(-torch.inf), torch.tensor(ID_MASK)))  # not above the key of any token


def sample_top(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, num: int, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """The `num` tokens of each row with the largest logit / temperature + noise, best first, of equals the lowest id
    first. Column 0 is what `sample` returns.

    Args:
        logits: fp32 [num_rows, num_tokens]; -Inf excludes a token; no NaN.
        temperature: fp32 [num_rows]; 0 takes the plain order of the logits.
        keys: of the noise.
        first_token_id: the token of column 0.
    Returns:
        values: fp32 [num_rows, num], scaled logit plus noise; -Inf where a row has no more tokens.
        token_ids: int64 [num_rows, num]; first_token_id where the value is -Inf.
    """
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    implementation = sample_top_cpu if logits.device.type == "cpu" else sample_top_reference
    values, token_ids = implementation(logits, temperature, keys, num=num, first_token_id=first_token_id)
    missing = num - values.shape[1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        token_ids = torch.nn.functional.pad(token_ids, (0, missing))
    return values, torch.where(values > -torch.inf, token_ids, first_token_id)


def sample_top_reference(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, num: int, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """`sample_top` in its plainest form, noise for every token; no more columns than there are tokens."""
    noise = gumbel_noise_range(
        keys.seeds, keys.sample_indices, keys.positions, first_token_id=first_token_id, num_tokens=logits.shape[1]
    )
    noisy = (temperature > 0).unsqueeze(1)
    values = scale_by_temperature(logits, temperature) + torch.where(noisy, noise, 0.0)
    return unpack_sort_key(top_sort_keys(values, num, first_token_id=first_token_id))


def sample_top_cpu(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, num: int, first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """`sample_top` with noise only for tokens that could be among the best.

    Noise lies between NOISE_MIN and NOISE_MAX and rounding is monotone, so a token whose scaled logit plus NOISE_MAX is
    below the num-th largest plus NOISE_MIN, both as rounded, has `num` better ones. The largest logits of the tiles
    stand in for the num-th largest, which they cannot exceed.
    """
    num_rows, num_tokens = logits.shape
    num_tiles = -(-num_tokens // COLUMN_TILE)
    padded = torch.nn.functional.pad(logits, (0, num_tiles * COLUMN_TILE - num_tokens), value=-torch.inf)
    tiles = padded.view(num_rows, num_tiles, COLUMN_TILE)
    noisy = (temperature > 0).unsqueeze(1)
    tile_max = scale_by_temperature(tiles.amax(dim=2), temperature)  # division is monotone
    if num <= num_tiles:
        base = tile_max.topk(num, dim=1).values[:, -1:]
    else:
        base = torch.full((num_rows, 1), -torch.inf)
    # At or above the lowest number, so that -Inf is no candidate.
    threshold = (base + torch.where(noisy, NOISE_MIN, 0.0)).clamp(min=LOWEST)  # [num_rows, 1]
    reach = torch.where(noisy, NOISE_MAX, 0.0)  # [num_rows, 1]

    tile_row, tile = (tile_max + reach >= threshold).nonzero(as_tuple=True)
    scaled = scale_by_temperature(tiles[tile_row, tile], temperature[tile_row])  # [num_hot_tiles, COLUMN_TILE]
    picked = (scaled + reach[tile_row] >= threshold[tile_row]).nonzero(as_tuple=True)
    row = tile_row[picked[0]]  # [num_candidates], ascending
    token_ids = tile[picked[0]] * COLUMN_TILE + picked[1] + first_token_id
    noise_keys = keys.select(row)
    noise = gumbel_noise(noise_keys.seeds, noise_keys.sample_indices, noise_keys.positions, token_ids)
    values = scaled[picked] + torch.where(noisy[row, 0], noise, 0.0)
    return unpack_sort_key(_top_of_rows(row, pack_sort_key(values, token_ids), num_rows=num_rows, num=num))


def _top_of_rows(row: Tensor, sort_keys: Tensor, *, num_rows: int, num: int) -> Tensor:
    """The `num` largest keys of each row, descending, of keys [num_candidates] with ascending rows."""
    counts = torch.bincount(row, minlength=num_rows)
    first = counts.cumsum(dim=0) - counts
    width = max(num, int(counts.max()) if num_rows else 0)
    table = torch.full((num_rows, width), EXCLUDED_KEY)
    table[row, torch.arange(len(row)) - first[row]] = sort_keys
    return table.topk(num, dim=1).values
