"""The schedule of a captured step: made on the device, by operators whose shapes do not depend on the lengths.

schedule.py decides on the host from lengths that it knows. A captured step replays with lengths that only the device
knows, so here every seq gets the query tiles of the most new tokens that it may have. Tiles that a seq does not need
have no keys, and the kernels pass over them. As many programs start as the device holds, and as many of them have work
as the host would start.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.paged_kv import LengthBounds
from kernels.attention.schedule import (
    MAX_SPLIT_ROWS,
    MIN_TILES_PER_PROGRAM,
    Schedule,
    Settings,
    SplitWork,
    Tiling,
    WholeWork,
    choose_tiling,
    choose_whole_tiling,
    padded,
    resident_programs,
)


def make_static_schedule(settings: Settings, bounds: LengthBounds, seq_lens: Tensor, cu_seqlens_q: Tensor) -> Schedule:
    """The schedule of seqs with seq_lens, int32 [num_seqs], and cu_seqlens_q, int32 [num_seqs + 1], of which no seq has
    more than `bounds.max_new` new tokens. Waits for nothing, and reads nothing on the host."""
    assert not settings.tree, "drafts of a captured step are chains"
    if settings.batch_invariant:
        # One pass over masked tiles: the kernel's unmasked part would follow a tile that no token fills.
        tiling = choose_whole_tiling(settings)
        query_tiles = _query_tiles(bounds, tiling.tokens(settings.group), seq_lens.device)
        return Schedule(split=None, whole=WholeWork(tiling=tiling, query_tiles=query_tiles))
    tiling = choose_tiling(settings, min(bounds.max_new * settings.group, MAX_SPLIT_ROWS))
    return Schedule(split=_split_work(settings, bounds, tiling, seq_lens, cu_seqlens_q), whole=None)


def _query_tiles(bounds: LengthBounds, tokens: int, device: torch.device) -> Tensor:
    """int32 [num_seqs * tiles of a seq, 2]: seq, first of its new tokens."""
    seq = torch.arange(bounds.num_seqs, dtype=torch.int32, device=device)
    first_new = torch.arange(0, bounds.max_new, tokens, dtype=torch.int32, device=device)
    shape = (bounds.num_seqs, first_new.shape[0])
    return torch.stack([seq.unsqueeze(1).expand(shape), first_new.expand(shape)], dim=2).flatten(0, 1)


def _split_work(
    settings: Settings, bounds: LengthBounds, tiling: Tiling, seq_lens: Tensor, cu_seqlens_q: Tensor
) -> SplitWork:
    device, num_programs = seq_lens.device, resident_programs(seq_lens.device)
    query_tiles = _query_tiles(bounds, tiling.tokens(settings.group), device)
    num_key_tiles = _num_key_tiles(settings, bounds, tiling, seq_lens, cu_seqlens_q)
    tile_starts = F.pad(num_key_tiles.cumsum(0), (1, 0))  # int64 [num_query_tiles + 1]
    tiles_of_head = tile_starts[-1:]
    num_tiles = tiles_of_head * settings.num_kv_heads
    num_busy = ((num_tiles + MIN_TILES_PER_PROGRAM - 1) // MIN_TILES_PER_PROGRAM).clamp(1, num_programs)
    first_tiles = torch.arange(num_programs, device=device) * num_tiles // num_busy % tiles_of_head.clamp(min=1)
    first_query_tiles = torch.searchsorted(tile_starts, first_tiles, right=True, out_int32=True) - 1
    rows, dim = tiling.rows, padded(settings.head_dim)
    return SplitWork(
        tiling=tiling,
        num_programs=num_programs,
        query_tiles=query_tiles,
        tile_starts=tile_starts.to(torch.int32),
        first_query_tiles=first_query_tiles,
        num_busy=num_busy.to(torch.int32),
        parts=torch.empty(num_programs, 2, rows, dim, device=device),
        part_stats=torch.empty(num_programs, 2, 2, rows, device=device),
        counters=torch.zeros(settings.num_kv_heads * query_tiles.shape[0], dtype=torch.int32, device=device),
    )


def _num_key_tiles(
    settings: Settings, bounds: LengthBounds, tiling: Tiling, seq_lens: Tensor, cu_seqlens_q: Tensor
) -> Tensor:
    """int64 [num_query_tiles]: how many key tiles each query tile sees; 0 if no new token is in it."""
    tokens = tiling.tokens(settings.group)
    seq_len = seq_lens.to(torch.int64).unsqueeze(1)  # [num_seqs, 1]
    num_new = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).to(torch.int64).unsqueeze(1)
    first_new = torch.arange(0, bounds.max_new, tokens, device=seq_lens.device)  # [tiles of a seq]
    first = seq_len - num_new + first_new  # [num_seqs, tiles of a seq], a position
    end = torch.minimum(first + tokens, seq_len)
    window = settings.sliding_window
    begin = torch.zeros_like(first) if window is None else (first - window + 1).clamp(min=0)
    tiles = (end + tiling.keys - 1) // tiling.keys - begin // tiling.keys
    return torch.where(first_new < num_new, tiles, 0).flatten()
