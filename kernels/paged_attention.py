"""Attention of packed query tokens over a paged KV cache: the launcher and its reference.

Query token t belongs to seq b iff cu_seqlens_q[b] <= t < cu_seqlens_q[b + 1]. The new tokens of a seq are its last
ones, their keys and values already stand in the cache, and each attends to all positions up to its own:

    seq_lens[b] = 7, three new tokens        key position   0 1 2 3 4 5 6
                                             new token 4    x x x x x . .
                                             new token 5    x x x x x x .
                                             new token 6    x x x x x x x

so prefill chunks, verify rows and decode rows are one operator, and differ only in how many tokens are new.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_attention_cpu import paged_attention_cpu
from kernels.paged_kv import SeqRows, rows_of_seqs


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What can be worked out once for all layers of a step."""

    seqs: list[SeqRows] | None  # None: nothing on this device


def plan_attention(
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    num_tokens: int,
    num_blocks: int,
    block_size: int,
) -> AttentionPlan:
    """The plan of all calls of paged_attention with these lengths and blocks, in caches of one shape.

    Raises ValueError for lengths and blocks that cannot be.
    """
    if seq_lens.device.type != "cpu":
        return AttentionPlan(None)
    return AttentionPlan(
        rows_of_seqs(
            block_table,
            seq_lens,
            cu_seqlens_q,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            block_size=block_size,
        )
    )


def paged_attention(
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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """softmax(q k^T * softmax_scale) v for each query token over the keys of its own seq.

    q: [num_tokens, num_q_heads, head_dim]; tokens and heads may be strided (a slice of a fused projection), features
    may not. k_cache, v_cache: contiguous [num_blocks, block_size, num_kv_heads, head_dim] in q's dtype; query head h
    reads KV head h // (num_q_heads // num_kv_heads). block_table: int32 [num_seqs, max_blocks]; entries past a seq's
    last block are not read. seq_lens: int32 [num_seqs], keys of each seq, this batch's new tokens included.
    cu_seqlens_q: int32 [num_seqs + 1]. sliding_window: a token sees itself and the sliding_window - 1 positions before.
    batch_invariant: the bits of a token's result depend neither on the batch around it nor on how many tokens of its
    seq are computed together (see paged_attention_cpu.py); needs a probe of the machine. plan: from plan_attention for
    the same lengths and blocks; without it every call makes its own.

    Returns [num_tokens, num_q_heads, head_dim] in q's dtype. What the cache holds outside a seq's own slots, NaN
    included, has no influence. Raises ValueError naming the argument that does not fit.
    """
    _check(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: expected None or at least 1, got {sliding_window}")
    if q.device.type == "cpu":
        if plan is None or plan.seqs is None:
            num_blocks, block_size = k_cache.shape[:2]
            plan = plan_attention(
                block_table,
                seq_lens,
                cu_seqlens_q,
                num_tokens=q.shape[0],
                num_blocks=num_blocks,
                block_size=block_size,
            )
        assert plan.seqs is not None, "a plan on cpu lists the seqs"
        return paged_attention_cpu(
            q,
            k_cache,
            v_cache,
            plan.seqs,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            batch_invariant=batch_invariant,
        )
    if batch_invariant:
        raise ValueError(f"batch_invariant: attention can keep this on cpu only so far, got tensors on {q.device}")
    return paged_attention_reference(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
    )


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """The definition, one seq at a time, in fp32."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads  # query heads that share a KV head
    bounds = cu_seqlens_q.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        new = slice(bounds[seq], bounds[seq + 1])
        blocks = block_table[seq, : -(-seq_len // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:seq_len].float().repeat_interleave(group, dim=1)  # [keys, num_q_heads, d]
        v = v_cache[blocks].flatten(0, 1)[:seq_len].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[new].float(), k) * softmax_scale
        key_positions = torch.arange(seq_len, device=q.device)
        query_positions = key_positions[seq_len - (new.stop - new.start) :].unsqueeze(1)
        hidden = key_positions > query_positions
        if sliding_window is not None:
            hidden |= key_positions <= query_positions - sliding_window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[new] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor
) -> None:
    """Layouts only: the values are checked where they are read on the host anyway."""
    if q.ndim != 3 or q.stride(-1) != 1:
        raise ValueError(
            f"q: expected [num_tokens, num_q_heads, head_dim] with contiguous features, got {list(q.shape)} "
            f"with strides {list(q.stride())}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4 or cache.shape != k_cache.shape or cache.shape[3] != q.shape[2] or not cache.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [num_blocks, block_size, num_kv_heads, {q.shape[2]}], got "
                f"{list(cache.shape)} with strides {list(cache.stride())}"
            )
        if cache.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} like q, got {cache.dtype}")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q: expected a multiple of {k_cache.shape[2]} KV heads, got {q.shape[1]} query heads")
    num_seqs = seq_lens.numel()
    for name, x, shape in (
        ("seq_lens", seq_lens, (num_seqs,)),
        ("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,)),
        ("block_table", block_table, (num_seqs, *block_table.shape[-1:])),
    ):
        if x.dtype != torch.int32 or x.shape != shape:
            raise ValueError(f"{name}: expected int32 {list(shape)}, got {x.dtype} {list(x.shape)}")
