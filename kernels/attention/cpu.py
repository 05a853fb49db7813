"""Paged attention on CPU.

The compiled kernel (native.py) computes whatever it can. There are three ways to compute the rest.

*SDPA* is torch's own: one call, one parallel region. A row is a query head of a new token. A single row is computed
twice, because SDPA takes half as long for two. *SDPA side by side* serves several short seqs of similar length. Calling
an operator costs as much as copying half a megabyte, so their keys and values are gathered for one call. *Tiles*
(tiles.py) serve `batch_invariant`, because SDPA's rounding of a row depends on the number of other rows. They also
serve calls that want the softmax sums, which SDPA does not return.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.call import AttentionCall
from kernels.attention.native import can_attend, native_attention
from kernels.attention.paged_kv import AlikeSeqs, SeqBatch, SeqRows
from kernels.attention.tiles import attend_rows, attend_rows_invariant, first_key, hidden_keys, queries_of_rows
from kernels.kv.fp8 import KVScales, from_fp8

# Query tokens per SDPA call. Bounds the mask, and skips keys that no query token sees. A tree always fits.
_SDPA_TOKENS = 64
# Of one seq's keys and values. Gathering more takes longer than a separate call.
_MAX_GATHERED_BYTES = 1 << 19


def paged_attention_cpu(call: AttentionCall, groups: Sequence[AlikeSeqs], *, batch_invariant: bool) -> None:
    """Write the results of a checked call for CPU tensors to call.out and call.lse."""
    if can_attend(call):
        native_attention(call)
        return
    if call.kv_scales is not None:
        call = _widened(call, call.kv_scales)
    for alike in groups:
        if alike.batch is not None and not batch_invariant and _may_gather(call, alike.batch):
            _attend_side_by_side(call, alike.batch)
            continue
        for seq in alike.seqs:
            if batch_invariant:
                attend_rows_invariant(call, seq)
            elif call.lse is not None:
                attend_rows(call, seq)
            else:
                _attend_sdpa(call, seq)


def _widened(call: AttentionCall, scales: KVScales) -> AttentionCall:
    """The call with caches in q's dtype, in which only the blocks of its seqs are filled."""
    k_cache, v_cache = (call.q.new_zeros(call.k_cache.shape) for _ in range(2))
    blocks = (
        call.block_table.clamp(0, len(k_cache) - 1).unique().long()
    )  # entries after a seq's last one may be anything
    k_cache[blocks] = from_fp8(call.k_cache[blocks], scales.k, call.q.dtype)
    v_cache[blocks] = from_fp8(call.v_cache[blocks], scales.v, call.q.dtype)
    return replace(call, k_cache=k_cache, v_cache=v_cache, kv_scales=None)


def _may_gather(call: AttentionCall, batch: SeqBatch) -> bool:
    if call.lse is not None or call.ancestors is not None or call.sliding_window is not None:
        return False
    num_bytes = 2 * batch.num_keys * call.k_cache[0, 0].numel() * call.k_cache.element_size()
    return num_bytes <= _MAX_GATHERED_BYTES


def _attend_side_by_side(call: AttentionCall, batch: SeqBatch) -> None:
    """All seqs of a batch in one call."""
    num_seqs, num_rows = batch.num_seqs, batch.num_new * call.group
    shape = (num_seqs, batch.num_new, call.num_kv_heads, call.group, call.q.shape[2])

    def gathered(cache: Tensor) -> Tensor:  # [num_seqs, num_kv_heads, num_keys, head_dim]
        slots = cache.view(-1, *cache.shape[2:]).index_select(0, batch.slots)
        return slots.view(num_seqs, batch.num_keys, *slots.shape[1:]).transpose(1, 2)

    q = call.q.index_select(0, batch.tokens).view(shape).transpose(1, 2)
    q = q.reshape(num_seqs, call.num_kv_heads, num_rows, -1)
    visible = batch.visible
    if visible is not None:
        if batch.num_new > 1:  # all rows of a single token see the same keys
            visible = visible.repeat_interleave(call.group, dim=1)
        visible = visible.unsqueeze(1)
    result = F.scaled_dot_product_attention(
        q if num_rows > 1 else q.expand(-1, -1, 2, -1),
        gathered(call.k_cache),
        gathered(call.v_cache),
        attn_mask=visible,
        scale=call.softmax_scale,
    )
    result = result[:, :, :num_rows].unflatten(2, (batch.num_new, call.group)).transpose(1, 2)
    call.out.index_copy_(0, batch.tokens, result.reshape(-1, *call.out.shape[1:]))


def _attend_sdpa(call: AttentionCall, seq: SeqRows) -> None:
    """Compute _SDPA_TOKENS new tokens at a time, against the keys up to the last of them.

    For a prefill chunk this is a third faster than one call with is_causal, which does not skip the keys above the
    diagonal (and aligns the diagonal to the first key, which is wrong after a prefix). The query heads of a KV head are
    rows of one product, because enable_gqa would read the keys once for each of them.
    """
    base, end = first_key(call, seq.first_position), seq.num_keys
    k = seq.read(call.k_cache, base, end).transpose(0, 1).unsqueeze(0)  # [1, num_kv_heads, keys, head_dim]
    v = seq.read(call.v_cache, base, end).transpose(0, 1).unsqueeze(0)
    for first in range(seq.first_position, end, _SDPA_TOKENS):
        last = min(first + _SDPA_TOKENS, end)
        keys = slice(first_key(call, first) - base, last - base)
        visible = None
        if last - first > 1:  # one token sees all keys from its first to itself
            queries = queries_of_rows(call, seq, first, last)
            visible = ~hidden_keys(call, seq, torch.arange(keys.start + base, last), queries)
        start = seq.first_token + first - seq.first_position
        tokens = slice(start, start + last - first)
        q = call.q[tokens].view(last - first, call.num_kv_heads, call.group, -1).transpose(0, 1)
        num_rows = (last - first) * call.group
        q = q.reshape(1, call.num_kv_heads, num_rows, -1)
        result = F.scaled_dot_product_attention(
            q if num_rows > 1 else q.expand(-1, -1, 2, -1),
            k[:, :, keys],
            v[:, :, keys],
            attn_mask=visible,
            scale=call.softmax_scale,
        )
        result = result[0, :, :num_rows].unflatten(1, (-1, call.group)).transpose(0, 1)
        call.out[tokens].view(result.shape).copy_(result)
