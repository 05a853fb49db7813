"""Attention in tiles of keys at fixed positions, in fp32.

For each tile of keys (positions 0..511, 512..1023, ...) and some query rows of a seq:

    scores  = q k^T                         hidden keys get the score HIDDEN
    peak'   = max(peak, max(scores))        decay = exp(peak - peak')
    weights = exp(scores - peak')
    total   = total * decay + sum(weights)
    result  = result * decay + weights v

and result / total at the end. This is the online softmax of FlashAttention (arXiv 2205.14135), merged in order of
position. `attend_rows` does this for all new rows of a seq at once. `attend_rows_invariant` gives a row the same bits
whatever else is computed. It gives every matrix product one shape: the rows of a fixed number of tokens and _FIXED_KEYS
keys, both padded. On one machine with a fixed number of threads, a row of a GEMM of fixed shape has the same bits at
every position and beside any other rows. A hidden or padded key adds exactly 0.0. So only the row's own query and keys
matter.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.call import AttentionCall
from kernels.attention.paged_kv import SeqRows

_TILE_KEYS = 512
_FIXED_KEYS = 256
# Unless one token has more. A decode step pays for all rows but uses those of one token, so few; prefill prefers more.
_FIXED_ROWS = 8
# Query tiles that go through the keys together. Bounds the memory for scores (13 MB with 12 heads).
_MAX_QUERY_TILES = 32
# A score that no real key has. It is finite, so a row that sees nothing of a tile makes no NaN: whatever it adds up
# there is multiplied by decay = exp(HIDDEN - real peak) = 0.0 as soon as it sees a key, at the latest its own.
HIDDEN = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Some consecutive new tokens of a seq, as rows.

    Both tensors have, or broadcast to, the shape of their scores with a last dimension of 1.
    """

    first: int  # position of the first token, by slot
    end: int
    positions: Tensor  # int64
    words: Tensor | None  # int64: their ancestors, see paged_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTile:
    k: Tensor  # fp32 [num_kv_heads, keys, head_dim]
    v: Tensor
    hidden: Tensor | None  # bool, broadcasts to [..., num_kv_heads, rows, keys]; None where every row sees all


def first_key(call: AttentionCall, position: int) -> int:
    """The first key position that a query at this position sees."""
    return 0 if call.sliding_window is None else max(0, position - call.sliding_window + 1)


def hidden_keys(call: AttentionCall, seq: SeqRows, slots: Tensor, queries: Queries) -> Tensor:
    """Which keys, [keys] by their position in the seq, a query must not see: bool [..., keys]."""
    if queries.words is not None:
        return _hidden_in_tree(call, seq, slots, queries.words)
    hidden = slots > queries.positions
    if call.sliding_window is not None:
        hidden |= slots <= queries.positions - call.sliding_window
    return hidden


def _hidden_in_tree(call: AttentionCall, seq: SeqRows, slots: Tensor, words: Tensor) -> Tensor:
    index = slots - seq.first_position  # among the new tokens
    is_new = (index >= 0) & (index < seq.num_tokens)
    related = (words >> index.clamp(0, seq.num_tokens - 1)) & 1 == 1
    hidden = (index >= 0) & ~(is_new & related)
    if call.sliding_window is not None:
        assert call.ancestors is not None, "words are those of the call"
        own_words = call.ancestors[seq.first_token : seq.first_token + seq.num_tokens]
        depths = _count_bits(own_words)[index.clamp(0, seq.num_tokens - 1)] - 1
        key_positions = torch.where(is_new, seq.first_position + depths, slots)
        query_positions = seq.first_position + _count_bits(words) - 1
        hidden |= key_positions <= query_positions - call.sliding_window
    return hidden


def _count_bits(words: Tensor) -> Tensor:
    return ((words.unsqueeze(-1) >> torch.arange(64)) & 1).sum(dim=-1)


def attend_rows(call: AttentionCall, seq: SeqRows) -> None:
    """Write the results of all new tokens of a seq to call.out and call.lse. Row = token * group + head in group."""
    tokens = slice(seq.first_token, seq.first_token + seq.num_tokens)
    q = call.q[tokens].view(seq.num_tokens, call.num_kv_heads, call.group, -1).transpose(0, 1)
    q = torch.mul(q.float(), call.softmax_scale).reshape(call.num_kv_heads, seq.num_tokens * call.group, -1)
    queries = queries_of_rows(call, seq, seq.first_position, seq.num_keys)
    peak, total, result = _merge(q, _key_tiles(call, seq, queries, fixed=False))
    shape = (call.num_kv_heads, seq.num_tokens, call.group, -1)
    result = result.div_(total).view(shape).transpose(0, 1)
    call.out[tokens].view(result.shape).copy_(result)
    if call.lse is not None:
        call.lse[tokens] = peak.add_(total.log_()).view(shape).transpose(0, 1).flatten(1)


def queries_of_rows(call: AttentionCall, seq: SeqRows, first: int, end: int) -> Queries:
    """The new tokens [first, end), with `group` rows each: tensors [rows, 1]."""
    positions, words = torch.arange(first, end), None
    if call.ancestors is not None:
        start = seq.first_token - seq.first_position
        words = call.ancestors[start + first : start + end].repeat_interleave(call.group).unsqueeze(1)
    if end - first > 1:
        positions = positions.repeat_interleave(call.group).unsqueeze(1)
    return Queries(first=first, end=end, positions=positions, words=words)


def attend_rows_invariant(call: AttentionCall, seq: SeqRows) -> None:
    """As attend_rows, but the bits depend neither on other tokens of this call nor on its other seqs."""
    tokens_per_tile = max(1, _FIXED_ROWS // call.group)
    step = tokens_per_tile * _MAX_QUERY_TILES
    for start in range(0, seq.num_tokens, step):
        num_tokens = min(step, seq.num_tokens - start)
        tokens = slice(seq.first_token + start, seq.first_token + start + num_tokens)
        q = torch.mul(call.q[tokens].float(), call.softmax_scale)
        q = _tile_rows(q.view(num_tokens, call.num_kv_heads, call.group, -1), tokens_per_tile)
        first = seq.first_position + start
        positions = torch.arange(first, first + num_tokens)
        queries = Queries(
            first=first,
            end=first + num_tokens,
            positions=_tile_tokens(call, positions, tokens_per_tile),
            words=None if call.ancestors is None else _tile_tokens(call, call.ancestors[tokens], tokens_per_tile),
        )
        peak, total, result = _merge(q, _key_tiles(call, seq, queries, fixed=True))
        _untile(result.div_(total), call.out[tokens], tokens_per_tile)
        if call.lse is not None:
            _untile(peak.add_(total.log_()), call.lse[tokens].unsqueeze(-1), tokens_per_tile)


def _tile_tokens(call: AttentionCall, x: Tensor, tokens_per_tile: int) -> Tensor:
    """[num_tokens] to [tiles, 1, rows, 1]."""
    return _tile_rows(x.view(-1, 1, 1, 1).expand(-1, 1, call.group, 1), tokens_per_tile)


def _tile_rows(x: Tensor, tokens_per_tile: int) -> Tensor:
    """[num_tokens, heads, group, d] to [tiles, heads, tokens_per_tile * group, d].

    The last tile is padded with zeros. They act as queries at position 0, whose results are never read.
    """
    num_tokens, heads, group, d = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -num_tokens % tokens_per_tile))
    x = x.view(-1, tokens_per_tile, heads, group, d).transpose(1, 2)
    return x.reshape(-1, heads, tokens_per_tile * group, d)


def _untile(tiles: Tensor, out: Tensor, tokens_per_tile: int) -> None:
    """Write [tiles, heads, rows, d] to [num_tokens, query heads, d], without the padding of the last tile."""
    rows = tiles.view(*tiles.shape[:2], tokens_per_tile, -1, tiles.shape[-1]).transpose(1, 2)
    out.copy_(rows.reshape(-1, *out.shape[1:])[: len(out)])


def _key_tiles(call: AttentionCall, seq: SeqRows, queries: Queries, *, fixed: bool) -> Iterator[KeyTile]:
    """The tiles that the queries see, in order; `fixed` pads the last with zeros."""
    tile_keys = _FIXED_KEYS if fixed else _TILE_KEYS
    first, end = queries.first, queries.end
    if queries.words is not None:  # a tree's nodes see any new token, and none comes before the first one
        first, end = seq.first_position, seq.num_keys
    for start in range(first_key(call, first) // tile_keys * tile_keys, end, tile_keys):
        num_keys = min(tile_keys, end - start)
        k = seq.read(call.k_cache, start, start + num_keys).float()
        v = seq.read(call.v_cache, start, start + num_keys).float()
        if fixed and num_keys < tile_keys:
            k = F.pad(k, (0, 0, 0, 0, 0, tile_keys - num_keys))
            v = F.pad(v, (0, 0, 0, 0, 0, tile_keys - num_keys))
        hidden = None
        if start + k.shape[0] > first + 1 or start < first_key(call, end - 1):
            hidden = hidden_keys(call, seq, torch.arange(start, start + k.shape[0]), queries)
        yield KeyTile(k=k.transpose(0, 1), v=v.transpose(0, 1), hidden=hidden)


def _merge(q: Tensor, tiles: Iterable[KeyTile]) -> tuple[Tensor, Tensor, Tensor]:
    """(peak, total [..., num_kv_heads, rows, 1], result [..., num_kv_heads, rows, head_dim]) over all tiles."""
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
    return merged


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [heads, rows, x] or [tiles, heads, rows, x] times b [heads, x, y]: one product of shape rows * x * y for
    each."""
    if a.ndim == 3:
        return torch.bmm(a, b)
    out = a.new_empty(*a.shape[:3], b.shape[2])
    for rows, out_rows in zip(a, out, strict=True):
        torch.bmm(rows, b, out=out_rows)
    return out
