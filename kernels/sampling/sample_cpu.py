"""The best tokens of rows of logits on CPU, computing noise only where it could matter.

Noise never exceeds NOISE_MAX, so whole tiles of tokens cannot reach the best and are skipped. In the other tiles the
random words decide first: a large word means small noise, and comparing words is cheaper than two logarithms for each.
The result has the same bits as with noise for every token.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling.gumbel import NOISE_MAX, NOISE_MIN, noise_from_words
from kernels.sampling.noise_keys import NoiseKeys, scale_by_temperature
from kernels.sampling.philox import token_words_numpy
from kernels.sampling.sort_key import EXCLUDED_KEY, pack_sort_key, unpack_sort_key

TILE = 64  # tokens
_TILE_GROUPS = TILE // 4  # one call of Philox yields the words of four tokens
LIKELY_TOKENS = 5  # with it, fewer tokens than wanted reach the goal in one of 10^8 cases
TILES_AT_ONCE = 1024  # whose words are in the cache together
LOWEST = torch.finfo(torch.float32).min

Candidates = tuple[Tensor, Tensor, Tensor]  # int64 [num_candidates] each: row, column of the tiled row, random word


def sample_cpu(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, *, first_token_id: int, thresholds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See kernels.sampling.sample.sample."""
    if thresholds is None and not (temperature > 0).any():
        return _best_logits(logits, first_token_id)
    best = top_keys_cpu(logits, temperature, keys, num=1, first_token_id=first_token_id, thresholds=thresholds)
    values, token_ids = unpack_sort_key(best.squeeze(1))
    return values, torch.where(values > -torch.inf, token_ids, first_token_id)


def _best_logits(logits: Tensor, first_token_id: int) -> tuple[Tensor, Tensor]:
    """`sample_cpu` of greedy rows: the first token of the first tile that has the largest logit."""
    tiles, first_group = _tiles(logits, first_token_id)
    tile = tiles.amax(dim=2).max(dim=1).indices  # documented to be the first of equal maxima, as below
    best = tiles[torch.arange(len(tile)), tile].max(dim=1)
    token_ids = 4 * first_group + tile * TILE + best.indices
    return best.values, torch.where(best.values > -torch.inf, token_ids, first_token_id)


def top_keys_cpu(
    logits: Tensor,
    temperature: Tensor,
    keys: NoiseKeys | None,
    *,
    num: int,
    first_token_id: int,
    thresholds: Tensor | None,
) -> Tensor:
    """Sort keys of each row's `num` best tokens, best first: int64 [num_rows, num]; EXCLUDED_KEY after the last token.

    Looks for the tokens that reach a goal. `num` of them nearly always do. Otherwise it searches again with a goal that
    `num` of them are certain to reach.
    """
    noisy = temperature > 0
    if thresholds is None and not noisy.any() and num <= logits.shape[1]:
        return _top_logits(logits, num, first_token_id)
    tiles, first_group = _tiles(logits, first_token_id)
    tile_max = scale_by_temperature(tiles.amax(dim=2), temperature)  # division is monotone
    if thresholds is not None:
        tile_max = tile_max.masked_fill(tile_max < thresholds.unsqueeze(1), -torch.inf)
    search = _Search(
        tiles=tiles,
        tile_max=tile_max,
        first_group=first_group,
        temperature=temperature,
        keys=keys,
        thresholds=thresholds,
    )
    certain = _certain_goal(tile_max, noisy, num)
    # The number of tokens that exceed the logarithm of the sum of exponentials by x is Poisson with mean about e^-x.
    # The sum over the tiles' largest is a lower bound of the whole, so on average LIKELY_TOKENS * (3 + num) or more
    # reach this.
    likely = tile_max.logsumexp(dim=1) - math.log(LIKELY_TOKENS * (3 + num))
    goal = torch.where(noisy & (likely > certain), likely, certain)
    best = search.run(goal, num)
    missed = (unpack_sort_key(best[:, -1])[0] < goal) & (goal > certain)
    if missed.any():
        again = search.run(torch.where(missed, certain, torch.inf), num)
        best[missed] = again[missed]
    return best


def _top_logits(logits: Tensor, num: int, first_token_id: int) -> Tensor:
    """`top_keys_cpu` of greedy rows."""
    token_ids = torch.arange(first_token_id, first_token_id + logits.shape[1])
    best = pack_sort_key(logits, token_ids).topk(num, dim=1).values
    return best.masked_fill_((best >> 32) == (EXCLUDED_KEY >> 32), EXCLUDED_KEY)  # -Inf


def _tiles(logits: Tensor, first_token_id: int) -> tuple[Tensor, int]:
    """Rows cut into tiles [num_rows, num_tiles, TILE], and the group of the first token of the first tile."""
    skipped = first_token_id % 4
    missing = -(skipped + logits.shape[1]) % TILE
    if skipped or missing:
        logits = torch.nn.functional.pad(logits, (skipped, missing), value=-torch.inf)
    return logits.unflatten(1, (-1, TILE)), first_token_id // 4


def _certain_goal(tile_max: Tensor, noisy: Tensor, num: int) -> Tensor:
    """fp32 [num_rows] that `num` tokens reach if there are so many; above -Inf, so that no excluded token does.

    The largest logits of the tiles stand in for the num-th largest logit, which they cannot exceed.
    """
    if num > tile_max.shape[1]:
        return torch.full((tile_max.shape[0],), LOWEST)
    base = tile_max.amax(dim=1) if num == 1 else tile_max.topk(num, dim=1).values[:, -1]
    return (base + torch.where(noisy, NOISE_MIN, 0.0)).clamp(min=LOWEST)


def _largest_words(tile_max: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.uint64]:
    """The largest word with which a token can reach the goal. Noise is at most -log((word + 1/2) / 2^32)."""
    slack = 1e-3 + 2.0**-22 * (np.abs(tile_max) + np.abs(goal))  # far larger than the rounding errors of an fp32 sum
    return (np.exp(np.minimum(tile_max - goal + slack, 0.0)) * 2.0**32).astype(np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Finds the tokens of rows that reach a goal."""

    tiles: Tensor  # fp32 [num_rows, num_tiles, TILE], logits
    tile_max: Tensor  # fp32 [num_rows, num_tiles], the largest scaled logit; -Inf where all are excluded
    first_group: int  # of the first token of a row
    temperature: Tensor  # fp32 [num_rows]
    keys: NoiseKeys | None  # None if no row has a temperature
    thresholds: Tensor | None  # fp32 [num_rows]

    def run(self, goal: Tensor, num: int) -> Tensor:
        """Sort keys int64 [num_rows, num] of the best tokens, including all that reach the goal of their row.

        goal: fp32 [num_rows], above -Inf.
        """
        noisy = self.temperature > 0
        reach = torch.where(noisy, NOISE_MAX, 0.0).unsqueeze(1)
        row, tile = (self.tile_max + reach >= goal.unsqueeze(1)).nonzero(as_tuple=True)
        tile_noisy = noisy[row]
        if not tile_noisy.any():
            row, column, word = _every_token(row, tile)
        elif tile_noisy.all():
            row, column, word = self._draw(row, tile, goal)
        else:
            drawn = self._draw(row[tile_noisy], tile[tile_noisy], goal)
            plain = _every_token(row[~tile_noisy], tile[~tile_noisy])
            row, column, word = (torch.cat(both) for both in zip(drawn, plain, strict=True))
        logits = self.tiles.flatten(1)[row, column]
        scaled = scale_by_temperature(logits.unsqueeze(1), self.temperature[row]).squeeze(1)
        possible = scaled + reach[row, 0] >= goal[row]  # so far the largest logit of the tile stood in for it
        if self.thresholds is not None:
            possible &= scaled >= self.thresholds[row]
        row, column, word = row[possible], column[possible], word[possible]
        values = scaled[possible] + torch.where(noisy[row], noise_from_words(word), 0.0)
        sort_keys = pack_sort_key(values, column + 4 * self.first_group)
        return _top_of_rows(row, sort_keys, num_rows=len(goal), num=num)

    def _draw(self, row: Tensor, tile: Tensor, goal: Tensor) -> Candidates:
        """The tokens of tiles [num_hot_tiles] whose words are small enough."""
        largest_words = _largest_words(self.tile_max[row, tile].double().numpy(), goal[row].double().numpy())
        rows, tiles = row.numpy(), tile.numpy()
        assert self.keys is not None, "rows with a temperature need noise"
        seeds, samples, positions = (
            part.numpy() for part in (self.keys.seeds, self.keys.sample_indices, self.keys.positions)
        )
        line = np.arange(_TILE_GROUPS, dtype=np.uint64)[:, None]
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]] = []
        for start in range(0, len(rows), TILES_AT_ONCE):
            part = slice(start, start + TILES_AT_ONCE)
            part_rows, part_tiles = rows[part], tiles[part]
            groups = (self.first_group + _TILE_GROUPS * part_tiles).astype(np.uint64) + line
            # [4, _TILE_GROUPS, num_tiles]
            words = token_words_numpy(seeds[part_rows], samples[part_rows], positions[part_rows], groups)
            hits = np.flatnonzero(words <= largest_words[part])
            place, hit_tile = np.divmod(hits, len(part_rows))
            word, group = np.divmod(place, _TILE_GROUPS)
            found.append((part_rows[hit_tile], part_tiles[hit_tile] * TILE + group * 4 + word, words.reshape(-1)[hits]))
        rows, columns, drawn = (np.concatenate(part) for part in zip(*found, strict=True))
        return torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(drawn.view(np.int64))


def _every_token(row: Tensor, tile: Tensor) -> Candidates:
    """The tokens of tiles [num_hot_tiles], without words."""
    columns = (tile * TILE).unsqueeze(1) + torch.arange(TILE)
    return row.repeat_interleave(TILE), columns.flatten(), torch.zeros(columns.numel(), dtype=torch.int64)


def _top_of_rows(row: Tensor, sort_keys: Tensor, *, num_rows: int, num: int) -> Tensor:
    """The `num` largest keys of each row, descending, of keys [num_candidates] in any order."""
    if num == 1:
        return torch.full((num_rows,), EXCLUDED_KEY).scatter_reduce_(0, row, sort_keys, "amax").unsqueeze(1)
    order = row.argsort()
    counts = row.bincount(minlength=num_rows)
    first = counts.cumsum(dim=0) - counts
    width = max(num, int(counts.max()) if num_rows else 0)
    table = torch.full((num_rows, width), EXCLUDED_KEY)
    row = row[order]
    table[row, torch.arange(len(row)) - first[row]] = sort_keys[order]
    return table.topk(num, dim=1).values
