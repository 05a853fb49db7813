"""Paged attention on CPU: which of the two ways each seq goes.

*Tiles* (attention_tiles.py) for decode and verify rows: torch's SDPA takes four to seven times as long for a single
query row, and as long for eight. *SDPA* for prefill chunks. With `batch_invariant` all rows go through tiles, because
SDPA rounds a row differently with the number of rows beside it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention_tiles import FIXED_KEYS, AttentionCall, attend_rows, attend_rows_invariant
from kernels.paged_kv import SeqRows, rows_of_seqs

# From here on a seq's new rows (tokens times query heads per KV head) are as fast through SDPA.
SDPA_MIN_ROWS = 33
SDPA_QUERY_TOKENS = 64


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
    """paged_attention for CPU tensors that passed its layout checks. Raises ValueError for values that do not fit."""
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    seqs = rows_of_seqs(
        block_table,
        seq_lens,
        cu_seqlens_q,
        num_tokens=q.shape[0],
        num_blocks=num_blocks,
        block_size=block_size,
    )
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
        elif seq.num_tokens * call.group < SDPA_MIN_ROWS:
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
                    f"attention with {num_q_heads} query heads, {num_kv_heads} KV heads and head_dim {head_dim} rounds "
                    f"a token differently in a chunk of {chunk} than in one of {length} ({torch.get_num_threads()} "
                    f"threads), so batch_invariant cannot be kept here"
                )
    return None


def _attend_sdpa(call: AttentionCall, seq: SeqRows) -> None:
    """A prefill chunk, SDPA_QUERY_TOKENS tokens at a time against the keys up to the last of them.

    That is a third faster than one call with is_causal, which does not skip the keys above the diagonal, and needs no
    mask of the whole chunk. (And is_causal aligns the diagonal to the first key: wrong behind a prefix.)
    """
    base, end = call.first_key(seq.first_position), seq.num_keys
    k = seq.read(call.k_cache, base, end).transpose(0, 1).unsqueeze(0)  # [1, num_kv_heads, keys, head_dim]
    v = seq.read(call.v_cache, base, end).transpose(0, 1).unsqueeze(0)
    positions = torch.arange(base, end)
    for first in range(seq.first_position, end, SDPA_QUERY_TOKENS):
        last = min(first + SDPA_QUERY_TOKENS, end)
        keys = slice(call.first_key(first) - base, last - base)
        hidden = call.hidden(positions[keys], positions[first - base : last - base].unsqueeze(1))
        start = seq.first_token + first - seq.first_position
        tokens = slice(start, start + last - first)
        result = F.scaled_dot_product_attention(
            call.q[tokens].transpose(0, 1).unsqueeze(0),
            k[:, :, keys],
            v[:, :, keys],
            attn_mask=~hidden,
            scale=call.softmax_scale,
            enable_gqa=call.group > 1,
        )
        call.out[tokens] = result.squeeze(0).transpose(0, 1)
