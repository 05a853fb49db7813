"""Decides on the host, from lengths alone, which program of the attention kernels computes what.

Two kernels share the work (core.py says what a query tile and a key tile are):

*split* (split.py): few new tokens of a seq against many keys, as in decoding and verifying. All pairs of query tile and
key tile form one sequence. Each program takes an equal stretch of it, across the borders of seqs and heads: stream-K,
LeanAttention (arXiv 2405.10480). So unequal lengths still give every program equal work.

*whole* (whole.py): a program takes one query tile through all of its keys. It serves chunks of prompts, whose many
query tiles fill the device by themselves, and everything with `batch_invariant`: with one tile shape and no split, a
row's bits depend only on its own query and keys.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention.paged_kv import SeqLengths

# Of the keys of a tile, and as much of its values. Two or three such tiles are in flight to a program (64 to 96 KB), so
# that two programs share the 227 KB of an H100's multiprocessor. More programs do not fit: each needs too many
# registers.
_KEY_TILE_BYTES = 16 << 10
_MAX_KEYS = 128
_PROGRAMS_PER_MULTIPROCESSOR = 2
# A split costs a round trip through memory: about as much as reading two key tiles.
MIN_TILES_PER_PROGRAM = 2
_MIN_ROWS = 16  # of a product on tensor cores
MAX_SPLIT_ROWS = 64
_WHOLE_ROWS = 128
_INVARIANT_ROWS = 64  # few enough for decode rows, enough for the warp-group products of an H100
_FP32_ROWS = 32  # fp32 is multiplied outside of tensor cores: more rows, or fewer warps, spill registers
_INTERPRETED_PROGRAMS = 7
_ALIGNED_NUMBERS = 4  # int32 in 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the schedule of a call besides the lengths."""

    head_dim: int
    element_size: int  # bytes
    num_kv_heads: int
    group: int  # query heads that share a KV head
    sliding_window: int | None
    tree: bool
    batch_invariant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Compile-time sizes of a kernel."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def tokens(self, group: int) -> int:
        """New tokens of one query tile."""
        return self.rows // group


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeWork:
    """One program for each query tile and KV head, with all keys of the tile."""

    tiling: Tiling
    query_tiles: Tensor  # int32 [num_query_tiles, 2]: seq, first of its new tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitWork:
    """Equal stretches of key tiles for the first `num_busy` of num_programs programs, one tile at least for each, and
    where programs leave the parts of split query tiles.

    `counters` counts the programs that have left their part of a query tile. The program that completes a count resets
    it to zero. So all layers of a step, which run one after another, share one schedule without clearing it in between.
    """

    tiling: Tiling
    num_programs: int
    query_tiles: Tensor  # int32 [num_query_tiles, 2]: seq, first of its new tokens
    tile_starts: Tensor  # int32 [num_query_tiles + 1]: number of key tiles of all earlier query tiles, for one KV head
    first_query_tiles: Tensor  # int32 [num_programs]: where a program's stretch begins
    num_busy: Tensor  # int32 [1], 1 to num_programs
    parts: Tensor  # fp32 [num_programs, 2, rows, padded head_dim]: sums of weights v; a stretch has two ends
    part_stats: Tensor  # fp32 [num_programs, 2, 2, rows]: peak and total
    counters: Tensor  # int32 [num_kv_heads * num_query_tiles], zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    split: SplitWork | None
    whole: WholeWork | None


def padded(head_dim: int) -> int:
    """The power of two that a tile uses for the features of a head."""
    return max(_MIN_ROWS, 1 << (head_dim - 1).bit_length())


def make_schedule(settings: Settings, lengths: SeqLengths, *, device: torch.device) -> Schedule:
    """Choose the kernel of each seq, and upload the work lists without waiting for the device."""
    num_new = lengths.num_new
    some = np.flatnonzero(num_new)
    whole_tiling = choose_whole_tiling(settings)
    if settings.batch_invariant:
        return Schedule(split=None, whole=_whole_work(settings, lengths, some, whole_tiling, device))
    num_programs = resident_programs(device)
    long = some[(num_new[some] * settings.group > MAX_SPLIT_ROWS) & (not settings.tree)]
    # Too few query tiles leave multiprocessors idle, so a short chunk after a long prefix is split as well.
    num_long_tiles = int(np.sum(-(-num_new[long] // whole_tiling.tokens(settings.group))))
    if num_long_tiles * settings.num_kv_heads * _PROGRAMS_PER_MULTIPROCESSOR < num_programs:
        long = long[:0]
    short = np.setdiff1d(some, long, assume_unique=True)
    return Schedule(
        split=_split_work(settings, lengths, short, num_programs, device),
        whole=_whole_work(settings, lengths, long, whole_tiling, device),
    )


def resident_programs(device: torch.device) -> int:
    """Programs that run at the same time."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def choose_tiling(settings: Settings, num_rows: int) -> Tiling:
    """Rows: the smallest power of two, num_rows or more, that holds all heads of a token; fewer in fp32.

    Stages: Triton 3.6 keeps two key tiles in flight with 3 stages if there are enough rows for warp-group products.
    Otherwise it needs 5, since the block table has to be read first.
    """
    is_fp32 = settings.element_size > 2
    wanted = max(min(num_rows, _FP32_ROWS) if is_fp32 else num_rows, settings.group)
    rows = max(_MIN_ROWS, 1 << (wanted - 1).bit_length())
    keys = min(_MAX_KEYS, max(_MIN_ROWS, _KEY_TILE_BYTES // (padded(settings.head_dim) * settings.element_size)))
    return Tiling(rows=rows, keys=keys, num_warps=8 if rows > 64 or is_fp32 else 4, num_stages=3 if rows >= 64 else 5)


def choose_whole_tiling(settings: Settings) -> Tiling:
    """With batch_invariant it depends on the model alone. Otherwise it is wide if a tile's results fit in registers."""
    wide = padded(settings.head_dim) <= 128 and not settings.batch_invariant
    return choose_tiling(settings, _WHOLE_ROWS if wide else _INVARIANT_ROWS)


def _whole_work(
    settings: Settings, lengths: SeqLengths, seqs: NDArray[np.int64], tiling: Tiling, device: torch.device
) -> WholeWork | None:
    if len(seqs) == 0:
        return None
    query_tiles, num_key_tiles = _query_tiles(settings, lengths, seqs, tiling)
    longest_first = np.argsort(-num_key_tiles, kind="stable")  # so that no long tile runs alone at the end
    (uploaded,) = _upload(device, query_tiles[longest_first])
    return WholeWork(tiling=tiling, query_tiles=uploaded)


def _split_work(
    settings: Settings, lengths: SeqLengths, seqs: NDArray[np.int64], max_programs: int, device: torch.device
) -> SplitWork | None:
    if len(seqs) == 0:
        return None
    most_rows = int(lengths.num_new[seqs].max()) * settings.group
    tiling = choose_tiling(settings, min(most_rows, MAX_SPLIT_ROWS))
    query_tiles, num_key_tiles = _query_tiles(settings, lengths, seqs, tiling)
    tile_starts = np.concatenate([[0], np.cumsum(num_key_tiles)])
    total = int(tile_starts[-1]) * settings.num_kv_heads
    num_programs = min(max_programs, -(-total // MIN_TILES_PER_PROGRAM))
    first_tiles = np.arange(num_programs) * total // num_programs % int(tile_starts[-1])
    first_query_tiles = np.searchsorted(tile_starts, first_tiles, side="right") - 1
    zeros = np.zeros(settings.num_kv_heads * len(query_tiles), np.int64)
    uploaded = _upload(device, query_tiles, tile_starts, first_query_tiles, np.array([num_programs]), zeros)
    scratch = torch.empty(0, dtype=torch.float32, device=device)
    return SplitWork(
        tiling=tiling,
        num_programs=num_programs,
        query_tiles=uploaded[0],
        tile_starts=uploaded[1],
        first_query_tiles=uploaded[2],
        num_busy=uploaded[3],
        parts=scratch.new_empty(num_programs, 2, tiling.rows, padded(settings.head_dim)),
        part_stats=scratch.new_empty(num_programs, 2, 2, tiling.rows),
        counters=uploaded[4],
    )


def _query_tiles(
    settings: Settings, lengths: SeqLengths, seqs: NDArray[np.int64], tiling: Tiling
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([num_query_tiles, 2] seq and first new token, [num_query_tiles] key tiles of each). Agrees with key_range."""
    num_new, tokens = lengths.num_new, tiling.tokens(settings.group)
    count = -(-num_new[seqs] // tokens)  # query tiles of each seq
    seq = np.repeat(seqs, count)
    first_new = (np.arange(len(seq)) - np.repeat(np.cumsum(count) - count, count)) * tokens
    seq_len = lengths.seq_lens[seq].astype(np.int64)
    num_prefix = seq_len - num_new[seq]
    first = num_prefix if settings.tree else num_prefix + first_new
    end = seq_len if settings.tree else np.minimum(first + tokens, seq_len)
    window = settings.sliding_window
    begin = np.zeros_like(first) if window is None else np.maximum(first - window + 1, 0)
    return np.stack([seq, first_new], axis=1), -(-end // tiling.keys) - begin // tiling.keys


def _upload(device: torch.device, *arrays: NDArray[np.int64]) -> list[Tensor]:
    """Upload arrays as int32 in one copy. Each starts at a multiple of 16 bytes, else Triton recompiles a kernel."""
    starts = np.cumsum([0, *(-(-array.size // _ALIGNED_NUMBERS) * _ALIGNED_NUMBERS for array in arrays)]).tolist()
    joined = np.zeros(starts[-1], np.int32)
    for start, array in zip(starts, arrays, strict=False):
        joined[start : start + array.size] = array.reshape(-1)
    there = torch.from_numpy(joined).to(device, non_blocking=True)
    pairs = zip(starts, arrays, strict=False)
    return [there[start : start + array.size].view(array.shape) for start, array in pairs]
