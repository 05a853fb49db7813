"""Attention of packed query tokens over a paged KV cache: the launcher and its reference.

Query token t belongs to seq b iff cu_seqlens_q[b] <= t < cu_seqlens_q[b + 1]. The new tokens of a seq are its last
tokens. Their keys and values are already in the cache. Each attends to all positions up to its own:

    seq_lens[b] = 7, three new tokens        key position   0 1 2 3 4 5 6
                                             new token 4    x x x x x . .
                                             new token 5    x x x x x x .
                                             new token 6    x x x x x x x

So prefill chunks, verify rows and decode rows are one operator and differ only in how many tokens are new.
schedule.py decides which kernel computes a seq; on CPU, cpu.py does.

If the new tokens are a tree of drafts, each sees the prefix and the tokens in its word of `ancestors`: bit j stands for
new token j of its seq. Slots follow the order of tokens. Positions follow the depth, which matters to sliding windows.
"""

from dataclasses import dataclass, field
from typing import Literal, overload

import torch
from torch import Tensor

from kernels.attention.call import AttentionCall, check_arguments
from kernels.attention.cpu import paged_attention_cpu
from kernels.attention.paged_kv import AlikeSeqs, LengthBounds, SeqLengths, alike_seqs, rows_of_seqs
from kernels.attention.schedule import Schedule, Settings, make_schedule
from kernels.attention.split import launch_split
from kernels.attention.static_schedule import make_static_schedule
from kernels.attention.whole import launch_whole
from kernels.dispatch import runs_triton
from kernels.kv.fp8 import KVScales

_MAX_TREE_TOKENS = 64  # bits of a word


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Data that all layers of a step can share. The layers run one after another on one stream."""

    lengths: SeqLengths | LengthBounds
    seqs: list[AlikeSeqs] | None  # None: on a device that runs the kernels
    schedules: dict[Settings, Schedule] = field(default_factory=dict)  # grows: layers may differ in their window


def plan_attention(
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    num_tokens: int,
    num_blocks: int,
    block_size: int,
    lengths: SeqLengths | LengthBounds | None = None,
) -> AttentionPlan:
    """Plan all calls of paged_attention with these lengths and blocks, in caches of one shape.

    lengths: the values of seq_lens and cu_seqlens_q, or their bounds, with which the device plans by itself and nothing
    is checked. Without it they are read, which waits for the device. Raises ValueError for impossible lengths and, if
    the CPU computes, for impossible blocks.
    """
    if runs_triton(seq_lens) and isinstance(lengths, LengthBounds):
        return AttentionPlan(lengths, None)
    if lengths is None or isinstance(lengths, LengthBounds):
        has_padding, lengths = lengths is not None, SeqLengths.read(seq_lens, cu_seqlens_q)
        num_tokens = int(lengths.cu_seqlens_q[-1]) if has_padding else num_tokens
    lengths.check(num_tokens=num_tokens, max_blocks=block_table.shape[1], block_size=block_size)
    if runs_triton(seq_lens):
        return AttentionPlan(lengths, None)
    seqs = rows_of_seqs(block_table, lengths, num_blocks=num_blocks, block_size=block_size)
    return AttentionPlan(lengths, alike_seqs(seqs, block_size))


@overload
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
    ancestors: Tensor | None = None,
    return_lse: Literal[False] = False,
    batch_invariant: bool = False,
    plan: AttentionPlan | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor: ...


@overload
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
    ancestors: Tensor | None = None,
    return_lse: Literal[True],
    batch_invariant: bool = False,
    plan: AttentionPlan | None = None,
    kv_scales: KVScales | None = None,
) -> tuple[Tensor, Tensor]: ...


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
    ancestors: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    plan: AttentionPlan | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * softmax_scale) v for each query token over the keys of its own seq.

    q: [num_tokens, num_q_heads, head_dim]; tokens and heads may be strided (a slice of a fused projection), features
    may not. k_cache, v_cache: contiguous [num_blocks, block_size, num_kv_heads, head_dim] in q's dtype; query head h
    reads KV head h // (num_q_heads // num_kv_heads). block_table: int32 [num_seqs, max_blocks]; entries past a seq's
    last block are not read. seq_lens: int32 [num_seqs], keys of each seq, this batch's new tokens included.
    cu_seqlens_q: int32 [num_seqs + 1]. sliding_window: a token sees itself and the sliding_window - 1 positions before.
    ancestors: int64 [num_tokens]; bit j of a token's word is set iff new token j of its seq is its ancestor or itself,
    and replaces causality among the new tokens, of which a seq may then have 64. batch_invariant: the bits of a token's
    result depend neither on the batch around it nor on how many tokens of its seq are computed together; needs a probe
    of the machine (probe.py). plan: from plan_attention for the same lengths and blocks; without it
    every call makes its own, and waits for the device. kv_scales: the caches hold FP8 as uint8 (kernels/kv/fp8.py).

    Returns [num_tokens, num_q_heads, head_dim] in q's dtype; with return_lse also the natural logarithm of each
    softmax's sum, fp32 [num_tokens, num_q_heads]. What the cache holds outside a seq's own slots, NaN included, has no
    influence. Raises ValueError naming the argument that does not fit.
    """
    call = AttentionCall(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        out=torch.empty_like(q, memory_format=torch.contiguous_format),
        lse=q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else None,
        ancestors=ancestors,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        kv_scales=kv_scales,
    )
    check_arguments(call)
    if plan is None:
        num_blocks, block_size = k_cache.shape[:2]
        plan = plan_attention(
            block_table,
            seq_lens,
            cu_seqlens_q,
            num_tokens=q.shape[0],
            num_blocks=num_blocks,
            block_size=block_size,
        )
    if ancestors is not None and (most_new := _most_new(plan.lengths)) > _MAX_TREE_TOKENS:
        raise ValueError(f"ancestors: a seq has {most_new} new tokens, more than {_MAX_TREE_TOKENS}")
    if plan.seqs is not None:
        paged_attention_cpu(call, plan.seqs, batch_invariant=batch_invariant)
    else:
        _launch(call, plan, batch_invariant=batch_invariant)
    return call.out if call.lse is None else (call.out, call.lse)


def _most_new(lengths: SeqLengths | LengthBounds) -> int:
    """Most new tokens of a seq."""
    return lengths.max_new if isinstance(lengths, LengthBounds) else int(lengths.num_new.max(initial=0))


def _launch(call: AttentionCall, plan: AttentionPlan, *, batch_invariant: bool) -> None:
    settings = Settings(
        head_dim=call.q.shape[2],
        element_size=call.q.element_size(),
        num_kv_heads=call.num_kv_heads,
        group=call.group,
        sliding_window=call.sliding_window,
        tree=call.ancestors is not None,
        batch_invariant=batch_invariant,
    )
    schedule = plan.schedules.get(settings)
    if schedule is None:
        if isinstance(plan.lengths, LengthBounds):
            schedule = make_static_schedule(settings, plan.lengths, call.seq_lens, call.cu_seqlens_q)
        else:
            schedule = make_schedule(settings, plan.lengths, device=call.q.device)
        plan.schedules[settings] = schedule
    if schedule.split is not None:
        launch_split(call, schedule.split)
    if schedule.whole is not None:
        launch_whole(call, schedule.whole, one_pass=batch_invariant)


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
    ancestors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one seq at a time, in fp32: (results, logarithms of the softmax sums)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads  # query heads that share a KV head
    bounds = cu_seqlens_q.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        new = slice(bounds[seq], bounds[seq + 1])
        num_new = new.stop - new.start
        blocks = block_table[seq, : -(-seq_len // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:seq_len].float().repeat_interleave(group, dim=1)  # [keys, num_q_heads, d]
        v = v_cache[blocks].flatten(0, 1)[:seq_len].float().repeat_interleave(group, dim=1)
        positions = torch.arange(seq_len, device=q.device)  # [keys]
        visible = positions <= positions[seq_len - num_new :].unsqueeze(1)  # [num_new, keys]
        if ancestors is not None:
            related = (ancestors[new].unsqueeze(1) >> torch.arange(num_new, device=q.device)) & 1  # [num_new, num_new]
            visible[:, seq_len - num_new :] = related.bool()
            positions[seq_len - num_new :] = seq_len - num_new + related.sum(dim=1) - 1
        if sliding_window is not None:
            visible &= positions > positions[seq_len - num_new :].unsqueeze(1) - sliding_window
        scores = torch.einsum("qhd,khd->hqk", q[new].float(), k) * softmax_scale
        scores = scores.masked_fill(~visible, -torch.inf)
        out[new] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).to(q.dtype)
        lse[new] = scores.logsumexp(dim=-1).T
    return out, lse
