"""Paged attention on CPU: which of two ways each seq goes.

*SDPA*, torch's own, for two rows or more, where a row is a query head of a new token: one call, one parallel region.
*Tiles* (attention_tiles.py) for a lone row, which SDPA takes four times as long for as for two. With `batch_invariant`
all rows go through tiles, because SDPA rounds a row differently with the number of rows beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention_tiles import FIXED_KEYS, AttentionCall, attend_rows, attend_rows_invariant
from kernels.paged_kv import SeqRows

# Query tokens in one call of SDPA: bounds the mask, and skips the keys that none of them sees.
SDPA_TOKENS = 64


def paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: Sequence[SeqRows],
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """paged_attention for CPU tensors that passed its layout checks."""
    num_kv_heads = k_cache.shape[2]
    call = AttentionCall(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        out=torch.empty_like(q, memory_format=torch.contiguous_format),
        num_kv_heads=num_kv_heads,
        group=q.shape[1] // num_kv_heads,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
    )
    for seq in seqs:
        if batch_invariant:
            attend_rows_invariant(call, seq)
        elif seq.num_tokens * call.group == 1:
            attend_rows(call, seq)
        else:
            _attend_sdpa(call, seq)
    return call.out


def probe_paged_attention_batch_invariant(num_q_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Compare the rows of a prefill in one piece with the same rows in pieces and alone, bit for bit.

    The products are fp32 whatever the cache holds, so one probe serves all dtypes.
    Returns None where they agree on this machine with this number of threads, else one sentence for the user.
    """
    length, block_size = FIXED_KEYS + 44, 16
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-length // block_size)
    q = torch.randn(length, num_q_heads, head_dim, generator=generator)
    k_cache, v_cache = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, generator=generator)
    blocks = list(range(num_blocks))

    def rows(start: int, end: int) -> Tensor:
        seq = SeqRows(first_token=0, num_tokens=end - start, first_position=start, blocks=blocks, neighbours=True)
        return paged_attention_cpu(
            q[start:end], k_cache, v_cache, [seq], softmax_scale=head_dim**-0.5, batch_invariant=True
        )

    whole = rows(0, length)
    for chunk in (1, 7, 64):
        for start in [*range(0, length - chunk, 37), length - chunk]:
            if not torch.equal(rows(start, start + chunk), whole[start : start + chunk]):
                return (
                    f"attention with {num_q_heads} query heads, {num_kv_heads} KV heads and head_dim {head_dim} rounds "
                    f"a token differently in a chunk of {chunk} than in one of {length} ({torch.get_num_threads()} "
                    f"threads), so batch_invariant cannot be kept here"
                )
    return None


def _attend_sdpa(call: AttentionCall, seq: SeqRows) -> None:
    """SDPA_TOKENS new tokens at a time, against the keys up to the last of them.

    For a prefill chunk that is a third faster than one call with is_causal, which does not skip the keys above the
    diagonal (and aligns it to the first key: wrong behind a prefix). The query heads of a KV head are rows of one
    product: enable_gqa would read the keys once for each.
    """
    base, end = call.first_key(seq.first_position), seq.num_keys
    k = seq.read(call.k_cache, base, end).transpose(0, 1).unsqueeze(0)  # [1, num_kv_heads, keys, head_dim]
    v = seq.read(call.v_cache, base, end).transpose(0, 1).unsqueeze(0)
    for first in range(seq.first_position, end, SDPA_TOKENS):
        last = min(first + SDPA_TOKENS, end)
        keys = slice(call.first_key(first) - base, last - base)
        visible = None
        if last - first > 1:  # one token sees all keys from its first to itself
            query_positions = torch.arange(first, last).repeat_interleave(call.group).unsqueeze(1)
            visible = ~call.hidden(torch.arange(keys.start + base, last), query_positions)
        start = seq.first_token + first - seq.first_position
        tokens = slice(start, start + last - first)
        q = call.q[tokens].view(last - first, call.num_kv_heads, call.group, -1).transpose(0, 1)
        result = F.scaled_dot_product_attention(
            q.reshape(1, call.num_kv_heads, (last - first) * call.group, -1),
            k[:, :, keys],
            v[:, :, keys],
            attn_mask=visible,
            scale=call.softmax_scale,
        )
        result = result.view(call.num_kv_heads, last - first, call.group, -1).transpose(0, 1)
        call.out[tokens].view(result.shape).copy_(result)
