"""Attention in which the keys of a prefix that seqs share are read once for all of them (Hydragen, arXiv 2402.05099).

Seqs share a prefix if their block tables begin with the same blocks. All their query tokens attend to it as one seq.
Then each seq's own tokens attend to what follows, and the two results are merged (cascade_merge.py). This is exact
except for rounding: each part is rounded once more to the dtype of q. KV read is S_p + sum of S_s instead of
B S_p + sum of S_s. prefix_groups.py decides whether that pays.

The part of the prefix is paged_attention too. The last keys of the prefix stand in for those of its query tokens, which
form a tree in which each sees all others. So each sees exactly the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention.paged_attention import AttentionPlan, paged_attention, plan_attention
from kernels.attention.paged_kv import SeqLengths
from kernels.upcoming.cascade_merge import cascade_merge
from kernels.upcoming.prefix_groups import PrefixGroup, query_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """Arguments of a call of paged_attention, for all layers."""

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    plan: AttentionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixPlan:
    """Data that all layers of a step can share."""

    tokens: list[slice]  # of each group, in the batch
    prefix: AttentionInputs  # a "seq" is a chunk of the query tokens of a group
    ancestors: Tensor  # int64 [tokens of all groups]: each sees all of its chunk
    suffix: AttentionInputs


def plan_shared_prefix(
    groups: Sequence[PrefixGroup],
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    num_blocks: int,
    block_size: int,
    lengths: SeqLengths | None = None,
) -> SharedPrefixPlan:
    """Plan all calls of shared_prefix_attention with these lengths and blocks, in caches of one shape.

    groups: at least one, in the order of the batch. Other arguments: as for plan_attention. Raises ValueError if a
    group does not fit the batch, or its prefix would hold new tokens.
    """
    if lengths is None:
        lengths = SeqLengths.read(seq_lens, cu_seqlens_q)
    _check_groups(groups, lengths, block_size)
    bounds, num_seqs, num_columns = lengths.cu_seqlens_q, len(lengths.seq_lens), block_table.shape[1]
    tokens = [slice(int(bounds[g.first_seq]), int(bounds[g.first_seq + g.num_seqs])) for g in groups]
    chunked = [
        query_chunks(part.stop - part.start, group.num_blocks * block_size)
        for part, group in zip(tokens, groups, strict=True)
    ]
    repeats = [len(chunks) for chunks in chunked]
    chunks = np.concatenate(chunked).astype(np.int32)  # [num_chunks]: query tokens
    rows = np.repeat([group.first_seq for group in groups], repeats)
    num_prefix_blocks = np.repeat([group.num_blocks for group in groups], repeats)
    prefix_lens = (num_prefix_blocks * block_size).astype(np.int32)
    columns = np.minimum(np.arange(num_prefix_blocks.max()), num_prefix_blocks[:, None] - 1)
    ancestors = np.array([(1 << chunk) - 1 for chunk in chunks.tolist()], dtype=np.uint64).view(np.int64)

    shifts = np.zeros(num_seqs, dtype=np.int64)  # number of a seq's blocks that are in its prefix
    for group in groups:
        shifts[group.first_seq : group.first_seq + group.num_seqs] = group.num_blocks
    suffix_columns = np.minimum(np.arange(num_columns) + shifts[:, None], num_columns - 1)
    suffix_lens = (lengths.seq_lens - shifts * block_size).astype(np.int32)

    inputs = partial(_inputs, block_table, num_blocks=num_blocks, block_size=block_size)
    return SharedPrefixPlan(
        tokens=tokens,
        prefix=inputs(
            rows[:, None] * num_columns + columns, SeqLengths(prefix_lens, np.cumsum([0, *chunks], dtype=np.int32))
        ),
        ancestors=torch.from_numpy(np.repeat(ancestors, chunks)).to(block_table.device, non_blocking=True),
        suffix=inputs(np.arange(num_seqs)[:, None] * num_columns + suffix_columns, SeqLengths(suffix_lens, bounds)),
    )


def shared_prefix_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: SharedPrefixPlan, *, softmax_scale: float
) -> Tensor:
    """The result of paged_attention for the batch of `plan`, except for rounding. q, k_cache, v_cache: as there.

    Causal within the new tokens of a seq. There is no sliding window, because it would hide a prefix from some seqs.
    """

    def attend(queries: Tensor, inputs: AttentionInputs, ancestors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return paged_attention(
            queries,
            k_cache,
            v_cache,
            inputs.block_table,
            inputs.seq_lens,
            inputs.cu_seqlens_q,
            softmax_scale=softmax_scale,
            ancestors=ancestors,
            return_lse=True,
            plan=inputs.plan,
        )

    queries = q[plan.tokens[0]] if len(plan.tokens) == 1 else torch.cat([q[tokens] for tokens in plan.tokens])
    prefix_out, prefix_lse = attend(queries, plan.prefix, plan.ancestors)
    out, lse = attend(q, plan.suffix)
    row = 0
    for tokens in plan.tokens:
        there = slice(row, row + tokens.stop - tokens.start)
        cascade_merge((prefix_out[there], prefix_lse[there]), (out[tokens], lse[tokens]), out=out[tokens])
        row = there.stop
    return out


def _inputs(
    block_table: Tensor, cells: NDArray[np.int64], lengths: SeqLengths, *, num_blocks: int, block_size: int
) -> AttentionInputs:
    """Arguments with these lengths and the blocks at these cells of `block_table`, which may be on a device."""
    device = block_table.device
    table, seq_lens, cu_seqlens_q = (
        torch.from_numpy(x).to(device, non_blocking=True) for x in (cells, lengths.seq_lens, lengths.cu_seqlens_q)
    )
    table = block_table.reshape(-1)[table]
    plan = plan_attention(
        table,
        seq_lens,
        cu_seqlens_q,
        num_tokens=int(lengths.cu_seqlens_q[-1]),
        num_blocks=num_blocks,
        block_size=block_size,
        lengths=lengths,
    )
    return AttentionInputs(block_table=table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q, plan=plan)


def _check_groups(groups: Sequence[PrefixGroup], lengths: SeqLengths, block_size: int) -> None:
    if not groups:
        raise ValueError("groups: expected at least one, got none: call paged_attention")
    end = 0
    for group in groups:
        if group.first_seq < end or group.num_seqs < 1 or group.first_seq + group.num_seqs > len(lengths.seq_lens):
            raise ValueError(
                f"groups: expected runs of {len(lengths.seq_lens)} seqs in their order, got {group} after {end} seqs"
            )
        begin, end = group.first_seq, group.first_seq + group.num_seqs
        if lengths.cu_seqlens_q[begin] == lengths.cu_seqlens_q[end]:
            raise ValueError(f"groups: expected query tokens in each, got none in {group}")
        cached = (lengths.seq_lens - lengths.num_new)[begin:end]
        if group.num_blocks < 1 or (cached < group.num_blocks * block_size).any():
            raise ValueError(
                f"groups: expected a prefix of 1 to {int(cached.min()) // block_size} blocks, which hold no new "
                f"token, got {group}"
            )
