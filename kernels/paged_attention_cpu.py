"""Attention over a paged KV cache on CPU, in two ways.

*Tiles*, for decode and verify rows: keys are read in tiles of KV_TILE tokens at fixed positions (0, 256, 512, ...),
widened to fp32, and merged in order with the running maximum of FlashAttention (arXiv 2205.14135). torch's own SDPA
spends 4 to 7 times as long on a single query row.

*SDPA*, for prefill chunks: 64 query tokens at a time against the keys up to the last of them.

`batch_invariant` sends everything through tiles, and every matrix product through one shape: QUERY_TILE_ROWS query
rows against KV_TILE keys, both padded. On one machine with one number of threads a row of a GEMM of fixed shape has the
same bits whatever the other rows are (probe_paged_attention_batch_invariant looks), and keys that a row must not see
add exactly 0.0 to its sums. So a row's result depends on its query and its keys alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

KV_TILE = 256
QUERY_TILE_ROWS = 8
# From here on a seq's new rows (tokens times query heads per KV head) are faster through SDPA.
SDPA_MIN_ROWS = 33
SDPA_QUERY_TOKENS = 64
# Seqs whose fp32 key tiles fit in here together share calls; larger ones go alone, and mostly without a gather.
SHARED_TILE_BYTES = 1 << 20
# Query tiles of one seq that share its widened keys: bounds the memory for scores.
MAX_QUERY_TILES = 32
# A score no real key has. Finite, so that a row that sees nothing of a tile has no NaN: its weights there are
# multiplied by exp(HIDDEN - real maximum) = 0.0 later.
HIDDEN = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTile:
    """Neighbouring new tokens of one seq that go through a kernel together."""

    first_token: int  # row in q
    num_tokens: int
    first_position: int
    blocks: list[int]  # of the whole seq

    @property
    def end(self) -> int:
        """Number of keys that its last token sees (without a sliding window)."""
        return self.first_position + self.num_tokens

    def split(self, num_tokens: int) -> list["QueryTile"]:
        return [
            QueryTile(
                first_token=self.first_token + start,
                num_tokens=min(num_tokens, self.num_tokens - start),
                first_position=self.first_position + start,
                blocks=self.blocks,
            )
            for start in range(0, self.num_tokens, num_tokens)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The tensors of one paged_attention call, and where its result goes."""

    q: Tensor  # [num_tokens, num_q_heads, head_dim]
    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: Tensor
    out: Tensor  # like q, contiguous
    softmax_scale: float
    sliding_window: int | None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.k_cache.shape[2]

    def first_key(self, position: int) -> int:
        """The first key position that a query at this position sees."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)

    def hidden(self, key_positions: Tensor, query_positions: Tensor) -> Tensor:
        """Which keys a query must not see; the two shapes broadcast."""
        hidden = key_positions > query_positions
        if self.sliding_window is not None:
            hidden |= key_positions <= query_positions - self.sliding_window
        return hidden


def paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """paged_attention for CPU tensors that passed its layout checks. Raises ValueError for lengths that do not fit."""
    seqs = _seqs(block_table, seq_lens, cu_seqlens_q, num_tokens=q.shape[0], cache_shape=k_cache.shape)
    call = Call(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        out=torch.empty_like(q, memory_format=torch.contiguous_format),
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
    )
    if batch_invariant:
        tokens_per_tile = max(1, QUERY_TILE_ROWS // call.group)
        for pack in _fixed_packs(seqs, tokens_per_tile, _max_pack(call)):
            _attend_tiles(call, pack, num_tokens=tokens_per_tile, fixed=True)
        return call.out
    for seq in seqs:
        if seq.num_tokens * call.group >= SDPA_MIN_ROWS:
            _attend_sdpa(call, seq)
    short = [seq for seq in seqs if seq.num_tokens * call.group < SDPA_MIN_ROWS]
    for pack in _equal_packs(short, _max_pack(call)):
        _attend_tiles(call, pack, num_tokens=pack[0].num_tokens, fixed=False)
    return call.out


def probe_paged_attention_batch_invariant(num_q_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Compare the rows of a prefill in one piece with the same rows in pieces and alone, bit for bit.

    The products are fp32 whatever the cache holds, so one probe serves all dtypes.
    Returns None where they agree on this machine with this number of threads, else one sentence for the user.
    """
    length, block_size = KV_TILE + 44, 16
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-length // block_size)
    q = torch.randn(length, num_q_heads, head_dim, generator=generator)
    k_cache, v_cache = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, generator=generator)
    table = torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0)

    def rows(start: int, end: int) -> Tensor:
        return paged_attention_cpu(
            q[start:end],
            k_cache,
            v_cache,
            table,
            torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, end - start], dtype=torch.int32),
            softmax_scale=head_dim**-0.5,
            batch_invariant=True,
        )

    whole = rows(0, length)
    for chunk in (1, 7, 64):
        for start in [*range(0, length - chunk, 37), length - chunk]:
            if not torch.equal(rows(start, start + chunk), whole[start : start + chunk]):
                return (
                    f"attention with {num_q_heads} query heads, {num_kv_heads} KV heads and head_dim {head_dim} rounds a "
                    f"token differently in a chunk of {chunk} than in one of {length} ({torch.get_num_threads()} "
                    f"threads), so batch_invariant cannot be kept here"
                )
    return None


def _seqs(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, *, num_tokens: int, cache_shape: torch.Size
) -> list[QueryTile]:
    """All new tokens of each seq that has any."""
    num_blocks, block_size = cache_shape[:2]
    bounds, lens, table = cu_seqlens_q.tolist(), seq_lens.tolist(), block_table.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens_q: expected to run from 0 to {num_tokens}, got {bounds[0]} to {bounds[-1]}")
    seqs = []
    for seq, seq_len in enumerate(lens):
        num_new = bounds[seq + 1] - bounds[seq]
        if not 0 <= num_new <= seq_len:
            raise ValueError(f"seq_lens: seq {seq} has {num_new} new tokens, but a length of {seq_len}")
        if num_new == 0:
            continue
        blocks = table[seq][: -(-seq_len // block_size)]
        if len(blocks) * block_size < seq_len:
            raise ValueError(
                f"block_table: seq {seq} of {seq_len} tokens has only {len(blocks)} blocks of {block_size}"
            )
        if min(blocks) < 0 or max(blocks) >= num_blocks:
            raise ValueError(f"block_table: seq {seq} names a block outside 0..{num_blocks - 1}: {blocks}")
        seqs.append(
            QueryTile(
                first_token=bounds[seq],
                num_tokens=num_new,
                first_position=seq_len - num_new,
                blocks=blocks,
            )
        )
    return seqs


# Packs: which query tiles share calls. A pack is either tiles of different seqs, or tiles of one seq.


def _max_pack(call: Call) -> int:
    return max(1, SHARED_TILE_BYTES // (KV_TILE * call.k_cache.shape[2] * call.k_cache.shape[3] * 4))


def _equal_packs(seqs: list[QueryTile], max_pack: int) -> Iterator[list[QueryTile]]:
    """Seqs with equally many new tokens and key tiles, of similar length."""
    seqs = sorted(seqs, key=lambda seq: (seq.num_tokens, seq.end))
    for _, equal in groupby(seqs, key=lambda seq: (seq.num_tokens, (seq.end - 1) // KV_TILE)):
        yield from _chunks(list(equal), max_pack)


def _fixed_packs(seqs: list[QueryTile], tokens_per_tile: int, max_pack: int) -> Iterator[list[QueryTile]]:
    """Tiles of tokens_per_tile tokens: those of a chunk with each other, lone ones with other seqs' lone ones."""
    lone = []
    for seq in seqs:
        tiles = seq.split(tokens_per_tile)
        if len(tiles) == 1:
            lone += tiles
        else:
            yield from _chunks(tiles, MAX_QUERY_TILES)
    lone.sort(key=lambda tile: tile.end)
    yield from _chunks(lone, max_pack)


def _chunks(tiles: list[QueryTile], size: int) -> Iterator[list[QueryTile]]:
    for start in range(0, len(tiles), size):
        yield tiles[start : start + size]


# Tiles


def _attend_tiles(call: Call, pack: list[QueryTile], *, num_tokens: int, fixed: bool) -> None:
    """Attention of a pack; `fixed` pads query rows and keys to the one shape of batch_invariant.

    Tiles with fewer than num_tokens tokens repeat their last one (only with `fixed`, where both get the same bits).
    """
    offsets = [[min(i, tile.num_tokens - 1) for i in range(num_tokens)] for tile in pack]
    token_index = torch.tensor([tile.first_token + i for tile, row in zip(pack, offsets, strict=True) for i in row])
    q = _query_rows(call, token_index, len(pack), fixed=fixed)  # [pack, num_kv_heads, rows, head_dim]
    positions = [[tile.first_position + i for i in row] for tile, row in zip(pack, offsets, strict=True)]
    lowest, highest, end = min(map(min, positions)), max(map(max, positions)), max(tile.end for tile in pack)
    query_positions: Tensor | None = None

    first_start = call.first_key(lowest) // KV_TILE * KV_TILE
    for start in range(first_start, end, KV_TILE):
        size = KV_TILE if fixed else min(KV_TILE, end - start)
        k = _load_keys(call.k_cache, pack, start, size)  # [num_kv_heads or pack * num_kv_heads, size, head_dim]
        v = _load_keys(call.v_cache, pack, start, size)
        scores = _multiply(q, k.transpose(1, 2))  # [pack, num_kv_heads, rows, size]
        if start + size > lowest + 1 or call.first_key(highest) > start:
            if query_positions is None:
                query_positions = _row_positions(positions, call.group, q.shape[2])
            scores.masked_fill_(call.hidden(torch.arange(start, start + size), query_positions), HIDDEN)
        tile_peak = scores.amax(dim=-1, keepdim=True)
        if start == first_start:
            peak = tile_peak
            weights = scores.sub_(peak).exp_()
            total, weighted = weights.sum(dim=-1, keepdim=True), _multiply(weights, v)
            continue
        new_peak = torch.maximum(peak, tile_peak)
        decay = peak.sub_(new_peak).exp_()
        weights = scores.sub_(new_peak).exp_()
        total.mul_(decay).add_(weights.sum(dim=-1, keepdim=True))
        weighted.mul_(decay).add_(_multiply(weights, v))
        peak = new_peak
    _store(call, token_index, weighted.div_(total), num_tokens)


def _query_rows(call: Call, token_index: Tensor, num_tiles: int, *, fixed: bool) -> Tensor:
    """The scaled queries of a pack, fp32 [num_tiles, num_kv_heads, rows, head_dim]; row = token * group + head."""
    _, num_q_heads, head_dim = call.q.shape
    group = call.group
    q = call.q.index_select(0, token_index).float().mul_(call.softmax_scale)
    q = q.view(num_tiles, -1, num_q_heads // group, group, head_dim).transpose(1, 2)
    q = q.reshape(num_tiles, num_q_heads // group, -1, head_dim)
    return F.pad(q, (0, 0, 0, -q.shape[2] % QUERY_TILE_ROWS)) if fixed else q


def _row_positions(positions: list[list[int]], group: int, num_rows: int) -> Tensor:
    """[num_tiles, 1, num_rows, 1]; padded rows are at position 0, so that they see a key."""
    rows = torch.tensor(positions).repeat_interleave(group, dim=1)
    return F.pad(rows, (0, num_rows - rows.shape[1])).view(len(positions), 1, num_rows, 1)


def _store(call: Call, token_index: Tensor, result: Tensor, num_tokens: int) -> None:
    """Rows [num_tiles, num_kv_heads, rows, head_dim] back to tokens."""
    num_tiles, num_kv_heads, _, head_dim = result.shape
    result = result[:, :, : num_tokens * call.group].view(num_tiles, num_kv_heads, num_tokens, call.group, head_dim)
    result = result.transpose(1, 2).reshape(token_index.numel(), num_kv_heads * call.group, head_dim)
    call.out.index_copy_(0, token_index, result.to(call.out.dtype))


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [pack, heads, rows, x] times b [heads, x, y] (one seq for all) or [pack * heads, x, y], as products per head."""
    pack, heads, rows, _ = a.shape
    if b.shape[0] == pack * heads:
        return torch.bmm(a.flatten(0, 1), b).view(pack, heads, rows, b.shape[2])
    out = torch.empty(pack, heads, rows, b.shape[2])
    for i in range(pack):
        torch.bmm(a[i], b, out=out[i])
    return out


# Reading the cache


def _load_keys(cache: Tensor, pack: list[QueryTile], start: int, size: int) -> Tensor:
    """Positions [start, start + size) as fp32; what lies past a seq's last key reads as zeros.

    Returns [num_kv_heads, size, head_dim] where the pack is of one seq, else [pack * num_kv_heads, size, head_dim].
    """
    if all(tile.blocks is pack[0].blocks for tile in pack):
        end = min(start + size, max(tile.end for tile in pack))
        keys = _positions(cache, pack[0].blocks, start, end).float()
        if end < start + size:
            keys = F.pad(keys, (0, 0, 0, 0, 0, start + size - end))
        return keys.transpose(0, 1)
    block_size, num_kv_heads, head_dim = cache.shape[1:]
    first, last = start // block_size, -(-(start + size) // block_size)
    ids = [tile.blocks[first:last] for tile in pack]
    ids = [row + [0] * (last - first - len(row)) for row in ids]
    gathered = cache.index_select(0, torch.tensor(ids).flatten()).view(len(pack), -1, num_kv_heads, head_dim)
    gathered = gathered[:, start - first * block_size :][:, :size].transpose(1, 2)
    keys = torch.empty(gathered.shape).copy_(gathered)  # [pack, num_kv_heads, size, head_dim]
    ends = [tile.end for tile in pack]
    if start + size > min(ends):
        unused = torch.arange(start, start + size) >= torch.tensor(ends).unsqueeze(1)
        keys.masked_fill_(unused.view(len(pack), 1, size, 1), 0.0)
    return keys.flatten(0, 1)


def _positions(cache: Tensor, blocks: list[int], start: int, end: int) -> Tensor:
    """Positions [start, end) of a seq, [end - start, num_kv_heads, head_dim]: a view where its blocks are neighbours."""
    block_size = cache.shape[1]
    first, last = start // block_size, -(-end // block_size)
    blocks = blocks[first:last]
    slots = cache.view(-1, *cache.shape[2:])
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        first_slot = (blocks[0] - first) * block_size
        return slots[first_slot + start : first_slot + end]
    gathered = cache.index_select(0, torch.tensor(blocks)).view(-1, *cache.shape[2:])
    return gathered[start - first * block_size : end - first * block_size]


# SDPA


def _attend_sdpa(call: Call, seq: QueryTile) -> None:
    """A prefill chunk, SDPA_QUERY_TOKENS tokens at a time: a third faster than one call with is_causal."""
    base = call.first_key(seq.first_position)
    k = _positions(call.k_cache, seq.blocks, base, seq.end).transpose(0, 1).unsqueeze(0)  # [1, num_kv_heads, keys, d]
    v = _positions(call.v_cache, seq.blocks, base, seq.end).transpose(0, 1).unsqueeze(0)
    positions = torch.arange(base, seq.end)
    for tile in seq.split(SDPA_QUERY_TOKENS):
        tokens = slice(tile.first_token, tile.first_token + tile.num_tokens)
        keys = slice(call.first_key(tile.first_position) - base, tile.end - base)
        visible = ~call.hidden(positions[keys], positions[tile.first_position - base : tile.end - base].unsqueeze(1))
        result = F.scaled_dot_product_attention(
            call.q[tokens].transpose(0, 1).unsqueeze(0),
            k[:, :, keys],
            v[:, :, keys],
            attn_mask=visible,
            scale=call.softmax_scale,
            enable_gqa=call.group > 1,
        )
        call.out[tokens] = result.squeeze(0).transpose(0, 1)
