"""Attention in tiles of keys at fixed positions, in fp32.

For each tile of keys (positions 0..511, 512..1023, ...) and some query rows of a seq:

    scores  = q k^T                         hidden keys get the score HIDDEN
    peak'   = max(peak, max(scores))        decay = exp(peak - peak')
    weights = exp(scores - peak')
    total   = total * decay + sum(weights)
    result  = result * decay + weights v

and result / total at the end: the online softmax of FlashAttention (arXiv 2205.14135), merged in order of position.

`attend_rows` does this for all new rows of a seq at once. `attend_rows_invariant` gives a row the same bits whatever is
computed beside it, by showing every matrix product one shape: the rows of a fixed number of tokens and FIXED_KEYS keys,
both padded.
On one machine with one number of threads a row of a GEMM of fixed shape has the same bits in every position and
company, and a hidden or padded key adds exactly 0.0; so what is left is the row's own query and keys.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.paged_kv import SeqRows

TILE_KEYS = 512
FIXED_KEYS = 256
# Unless one token has more. A decode step pays for all rows and uses one token's, so few; prefill would like more.
FIXED_ROWS = 8
# Query tiles that go through the keys together: bounds the memory for scores (13 MB with 12 heads).
MAX_QUERY_TILES = 32
# A score that no real key has. Finite, so that a row which sees nothing of a tile makes no NaN: whatever it adds up
# there is multiplied by decay = exp(HIDDEN - real peak) = 0.0 as soon as it sees a key, at the latest its own.
HIDDEN = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The tensors of one paged_attention call, and where its result goes."""

    q: Tensor  # [num_tokens, num_q_heads, head_dim]
    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: Tensor
    out: Tensor  # like q, contiguous
    num_kv_heads: int
    group: int  # query heads that share a KV head
    softmax_scale: float
    sliding_window: int | None

    def first_key(self, position: int) -> int:
        """The first key position that a query at this position sees."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)

    def hidden(self, key_positions: Tensor, query_positions: Tensor) -> Tensor:
        """Which keys a query must not see; the two shapes broadcast."""
        hidden = key_positions > query_positions
        if self.sliding_window is not None:
            hidden |= key_positions <= query_positions - self.sliding_window
        return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTile:
    k: Tensor  # fp32 [num_kv_heads, keys, head_dim]
    v: Tensor
    hidden: Tensor | None  # bool, broadcasts to [..., num_kv_heads, rows, keys]; None where every row sees all


def attend_rows(call: AttentionCall, seq: SeqRows) -> None:
    """Write the attention of all new tokens of a seq to call.out. Row = token * group + query head in its group."""
    tokens = slice(seq.first_token, seq.first_token + seq.num_tokens)
    q = call.q[tokens].view(seq.num_tokens, call.num_kv_heads, call.group, -1).transpose(0, 1)
    q = torch.mul(q.float(), call.softmax_scale).reshape(call.num_kv_heads, seq.num_tokens * call.group, -1)
    positions = torch.arange(seq.first_position, seq.num_keys)
    if seq.num_tokens > 1:
        positions = positions.repeat_interleave(call.group).unsqueeze(1)
    result, total = _merge(q, _key_tiles(call, seq, positions, seq.first_position, seq.num_keys, fixed=False))
    result = result.div_(total).view(call.num_kv_heads, seq.num_tokens, call.group, -1).transpose(0, 1)
    call.out[tokens].view(result.shape).copy_(result)


def attend_rows_invariant(call: AttentionCall, seq: SeqRows) -> None:
    """The same with bits that depend on neither the other tokens of this call nor its other seqs."""
    tokens_per_tile = max(1, FIXED_ROWS // call.group)
    step = tokens_per_tile * MAX_QUERY_TILES
    for start in range(0, seq.num_tokens, step):
        num_tokens = min(step, seq.num_tokens - start)
        tokens = slice(seq.first_token + start, seq.first_token + start + num_tokens)
        q = torch.mul(call.q[tokens].float(), call.softmax_scale)
        q = _tile_rows(q.view(num_tokens, call.num_kv_heads, call.group, -1), tokens_per_tile)
        first = seq.first_position + start
        positions = torch.arange(first, first + num_tokens).view(-1, 1, 1, 1).expand(-1, 1, call.group, 1)
        positions = _tile_rows(positions, tokens_per_tile)
        result, total = _merge(q, _key_tiles(call, seq, positions, first, first + num_tokens, fixed=True))
        result = result.div_(total).view(*q.shape[:2], tokens_per_tile, call.group, -1).transpose(1, 2)
        call.out[tokens] = result.reshape(-1, *call.out.shape[1:])[:num_tokens]


def _tile_rows(x: Tensor, tokens_per_tile: int) -> Tensor:
    """[num_tokens, heads, group, d] to [tiles, heads, tokens_per_tile * group, d].

    The last tile is filled up with zeros: queries at position 0, whose results nobody reads.
    """
    num_tokens, heads, group, d = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -num_tokens % tokens_per_tile))
    x = x.view(-1, tokens_per_tile, heads, group, d).transpose(1, 2)
    return x.reshape(-1, heads, tokens_per_tile * group, d)


def _key_tiles(
    call: AttentionCall, seq: SeqRows, positions: Tensor, first: int, end: int, *, fixed: bool
) -> Iterator[KeyTile]:
    """The tiles that queries at positions [first, end) see, in order; `fixed` pads the last with zeros."""
    tile_keys = FIXED_KEYS if fixed else TILE_KEYS
    for start in range(call.first_key(first) // tile_keys * tile_keys, end, tile_keys):
        num_keys = min(tile_keys, end - start)
        k = seq.read(call.k_cache, start, start + num_keys).float()
        v = seq.read(call.v_cache, start, start + num_keys).float()
        if fixed and num_keys < tile_keys:
            k = F.pad(k, (0, 0, 0, 0, 0, tile_keys - num_keys))
            v = F.pad(v, (0, 0, 0, 0, 0, tile_keys - num_keys))
        hidden = None
        if start + k.shape[0] > first + 1 or start < call.first_key(end - 1):
            hidden = call.hidden(torch.arange(start, start + k.shape[0]), positions)
        yield KeyTile(k=k.transpose(0, 1), v=v.transpose(0, 1), hidden=hidden)


def _merge(q: Tensor, tiles: Iterable[KeyTile]) -> tuple[Tensor, Tensor]:
    """(result [..., num_kv_heads, rows, head_dim], total [..., num_kv_heads, rows, 1]) over all tiles."""
    merged: tuple[Tensor, Tensor, Tensor] | None = None
    for tile in tiles:
        scores = _multiply(q, tile.k.transpose(1, 2))
        if tile.hidden is not None:
            scores.masked_fill_(tile.hidden, HIDDEN)
        peak = scores.amax(dim=-1, keepdim=True)
        if merged is not None:
            peak = torch.maximum(peak, merged[0])
        weights = scores.sub_(peak).exp_()
        total, result = weights.sum(dim=-1, keepdim=True), _multiply(weights, tile.v)
        if merged is not None:
            old_peak, old_total, old_result = merged
            decay = old_peak.sub_(peak).exp_()
            total.add_(old_total.mul_(decay))
            result.add_(old_result.mul_(decay))
        merged = peak, total, result
    assert merged is not None, "no keys, but every new token sees itself"
    return merged[2], merged[1]


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [heads, rows, x] or [tiles, heads, rows, x] times b [heads, x, y]: a product of shape rows * x * y for each."""
    if a.ndim == 3:
        return torch.bmm(a, b)
    out = a.new_empty(*a.shape[:3], b.shape[2])
    for rows, out_rows in zip(a, out, strict=True):
        torch.bmm(rows, b, out=out_rows)
    return out
