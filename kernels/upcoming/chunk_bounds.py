"""Bounds of the keys of a chunk, which give an upper bound of every score that a query can have in it.

A chunk is `chunk_size` consecutive positions of a seq; the last one may be shorter. The elementwise least and greatest
keys bound each product q_j * k_j, and the sum of these bounds bounds the score (Quest, arXiv 2406.10774; LeoAM, arXiv
2506.20187):

    q . k <= sum_j max(q_j * least_j, q_j * greatest_j)        for every key k of the chunk

so chunks with a low bound can be skipped, or not even be loaded. Bounds cannot be updated when keys are dropped, so
they are for chunks whose tokens are final.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton

TILE_TOKENS = 64
TILE_CHUNKS = 16
_ULP = 2.0**-23  # of 1 in fp32: twice the error of one operation


@triton.jit(do_not_specialize=["max_blocks", "num_chunks"])
def chunk_bounds_kernel(
    k_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    max_blocks,
    num_chunks,
    num_kv_heads,
    head_dim,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    chunk, head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, DIM)
    seq_len = tl.load(lens_ptr + seq)
    least = tl.full([DIM], float("inf"), tl.float32)
    greatest = tl.full([DIM], float("-inf"), tl.float32)
    for start in range(0, CHUNK, TILE):
        token = start + tl.arange(0, TILE)
        position = chunk * CHUNK + token
        mine = (token < CHUNK) & (position < seq_len)
        block = tl.load(table_ptr + seq * max_blocks + position // BLOCK_SIZE, mask=mine, other=0).to(tl.int64)
        row = (block * BLOCK_SIZE + position % BLOCK_SIZE) * num_kv_heads + head
        mask = mine[:, None] & (dim < head_dim)[None, :]
        k = tl.load(k_ptr + row[:, None] * head_dim + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.min(tl.where(mask, k, float("inf")), axis=0))
        greatest = tl.maximum(greatest, tl.max(tl.where(mask, k, float("-inf")), axis=0))
    holds_keys = chunk * CHUNK < seq_len
    out = out_ptr + ((seq * num_chunks + chunk) * 2 * num_kv_heads + head) * head_dim + dim
    tl.store(out, tl.where(holds_keys, least, 0.0), mask=dim < head_dim)
    tl.store(out + num_kv_heads * head_dim, tl.where(holds_keys, greatest, 0.0), mask=dim < head_dim)


@triton.jit(do_not_specialize=["num_chunks"])
def chunk_scores_kernel(
    q_ptr,
    bounds_ptr,
    lens_ptr,
    out_ptr,
    q_stride_seq,
    q_stride_head,
    num_chunks,
    num_kv_heads,
    head_dim,
    slack,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    head, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dim = tl.arange(0, DIM)
    used = chunk * CHUNK < tl.load(lens_ptr + seq)
    mask = used[:, None] & (dim < head_dim)[None, :]
    row = (seq * num_chunks + chunk) * 2 * num_kv_heads + head
    bounds = bounds_ptr + row[:, None] * head_dim + dim[None, :]
    least = tl.load(bounds, mask=mask, other=0.0).to(tl.float32)
    greatest = tl.load(bounds + num_kv_heads * head_dim, mask=mask, other=0.0).to(tl.float32)
    best = tl.full([TILE], float("-inf"), tl.float32)
    for member in tl.static_range(GROUP):
        q_row = q_ptr + seq * q_stride_seq + (head * GROUP + member) * q_stride_head
        q = tl.load(q_row + dim, mask=dim < head_dim, other=0.0).to(tl.float32)[None, :]
        terms = tl.maximum(q * least, q * greatest)
        best = tl.maximum(best, tl.sum(terms, axis=1) + slack * tl.sum(tl.abs(terms), axis=1))
    out = out_ptr + (seq * num_kv_heads + head) * num_chunks + chunk
    tl.store(out, tl.where(used, best, float("-inf")), mask=chunk < num_chunks)


def chunk_bounds(k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, chunk_size: int) -> Tensor:
    """Elementwise least and greatest key of each chunk.

    k_cache: contiguous [num_blocks, block_size, num_kv_heads, head_dim]. block_table: int32 [num_seqs, max_blocks];
    entries past a seq's last block are not read. seq_lens: int32 [num_seqs]. chunk_size: tokens, in any relation to
    block_size; for the bounds of single blocks, pass each as a seq of its own.

    Returns [num_seqs, num_chunks, 2, num_kv_heads, head_dim] in the cache's dtype, exact, with num_chunks for
    max_blocks full blocks; 0 is least, 1 greatest. Chunks after the end of a seq are zero. What the cache holds
    outside a seq's own slots, NaN included, has no influence. Raises ValueError naming the argument that does not fit.
    """
    _check_cache(k_cache, block_table, seq_lens, chunk_size)
    if not runs_triton(k_cache):
        return chunk_bounds_reference(k_cache, block_table, seq_lens, chunk_size=chunk_size)
    (num_seqs, max_blocks), (_, block_size, num_kv_heads, head_dim) = block_table.shape, k_cache.shape
    num_chunks = -(-max_blocks * block_size // chunk_size)
    bounds = k_cache.new_empty(num_seqs, num_chunks, 2, num_kv_heads, head_dim)
    if not bounds.numel():
        return bounds
    chunk_bounds_kernel[(num_chunks, num_kv_heads, num_seqs)](
        k_cache,
        block_table.contiguous(),
        seq_lens,
        bounds,
        max_blocks,
        num_chunks,
        num_kv_heads,
        head_dim,
        BLOCK_SIZE=block_size,
        CHUNK=chunk_size,
        TILE=min(TILE_TOKENS, triton.next_power_of_2(chunk_size)),
        DIM=triton.next_power_of_2(head_dim),
    )
    return bounds


def chunk_scores(q: Tensor, bounds: Tensor, seq_lens: Tensor, *, chunk_size: int) -> Tensor:
    """The most that a query of each seq can score with a key of each chunk, without softmax_scale.

    q: [num_seqs, num_q_heads, head_dim], one token a seq; seqs and heads may be strided, features may not. bounds,
    chunk_size: of chunk_bounds. seq_lens: int32 [num_seqs], the keys that the bounds are of.

    Returns fp32 [num_seqs, num_kv_heads, num_chunks]: the greatest over the query heads of a KV head, because they
    read the same chunks, and -inf for chunks after the end. Never below an exact score: the result includes the largest
    possible rounding error. Raises ValueError naming the argument that does not fit.
    """
    _check_scores(q, bounds, seq_lens, chunk_size)
    if not runs_triton(q):
        return chunk_scores_cpu(q, bounds, seq_lens, chunk_size=chunk_size)
    num_seqs, num_chunks, _, num_kv_heads, head_dim = bounds.shape
    scores = torch.empty(num_seqs, num_kv_heads, num_chunks, dtype=torch.float32, device=q.device)
    if not scores.numel():
        return scores
    chunk_scores_kernel[(triton.cdiv(num_chunks, TILE_CHUNKS), num_kv_heads, num_seqs)](
        q,
        bounds,
        seq_lens,
        scores,
        q.stride(0),
        q.stride(1),
        num_chunks,
        num_kv_heads,
        head_dim,
        head_dim * _ULP,
        CHUNK=chunk_size,
        GROUP=q.shape[1] // num_kv_heads,
        TILE=TILE_CHUNKS,
        DIM=triton.next_power_of_2(head_dim),
        enable_fp_fusion=False,  # the slack counts one rounding per operation
    )
    return scores


def chunk_bounds_reference(k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, chunk_size: int) -> Tensor:
    """The definition, one seq at a time."""
    block_size = k_cache.shape[1]
    num_chunks = -(-block_table.shape[1] * block_size // chunk_size)
    bounds = k_cache.new_zeros(block_table.shape[0], num_chunks, 2, *k_cache.shape[2:])
    for seq, seq_len in enumerate(seq_lens.tolist()):
        blocks = block_table[seq, : -(-seq_len // block_size)].long()
        keys = k_cache[blocks].flatten(0, 1)[:seq_len]  # [seq_len, num_kv_heads, head_dim]
        num_whole, ragged = divmod(seq_len, chunk_size)
        if num_whole:
            whole = keys[: num_whole * chunk_size].unflatten(0, (num_whole, chunk_size))
            bounds[seq, :num_whole] = torch.stack(whole.aminmax(dim=1), dim=1)
        if ragged:
            bounds[seq, num_whole] = torch.stack(keys[seq_len - ragged :].aminmax(dim=0))
    return bounds


def chunk_scores_reference(q: Tensor, bounds: Tensor, seq_lens: Tensor, *, chunk_size: int) -> Tensor:
    """The definition, all products at once."""
    num_seqs, num_chunks, _, num_kv_heads, head_dim = bounds.shape
    grouped = q.float().view(num_seqs, 1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim)
    least, greatest = bounds.float().unsqueeze(4).unbind(2)  # [num_seqs, num_chunks, num_kv_heads, 1, head_dim]
    terms = torch.maximum(grouped * least, grouped * greatest)
    scores = (terms.sum(-1) + head_dim * _ULP * terms.abs().sum(-1)).amax(3).transpose(1, 2)
    return scores.masked_fill(_behind_the_end(num_chunks, seq_lens, chunk_size), -torch.inf)


def chunk_scores_cpu(q: Tensor, bounds: Tensor, seq_lens: Tensor, *, chunk_size: int) -> Tensor:
    """As matrix products: a positive q_j takes the greatest, a negative one the least."""
    num_seqs, num_chunks, _, num_kv_heads, head_dim = bounds.shape
    grouped = q.float().view(num_seqs, num_kv_heads, q.shape[1] // num_kv_heads, head_dim)
    signed = torch.cat([grouped.clamp(max=0), grouped.clamp(min=0)], dim=-1)
    sides = bounds.float().permute(0, 3, 2, 4, 1).flatten(2, 3)  # [num_seqs, num_kv_heads, 2 * head_dim, num_chunks]
    scores = signed @ sides + (head_dim * _ULP) * (signed.abs() @ sides.abs())
    return scores.amax(2).masked_fill(_behind_the_end(num_chunks, seq_lens, chunk_size), -torch.inf)


def _behind_the_end(num_chunks: int, seq_lens: Tensor, chunk_size: int) -> Tensor:
    starts = torch.arange(num_chunks, device=seq_lens.device) * chunk_size
    return (starts >= seq_lens.unsqueeze(1)).unsqueeze(1)  # [num_seqs, 1, num_chunks]


def _check_cache(k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, chunk_size: int) -> None:
    if k_cache.ndim != 4 or not k_cache.is_contiguous() or not k_cache.is_floating_point():
        raise ValueError(
            f"k_cache: expected contiguous floating [num_blocks, block_size, num_kv_heads, head_dim], got "
            f"{k_cache.dtype} {list(k_cache.shape)} with strides {list(k_cache.stride())}"
        )
    if block_table.ndim != 2 or block_table.dtype != torch.int32:
        got = f"{block_table.dtype} {list(block_table.shape)}"
        raise ValueError(f"block_table: expected int32 [num_seqs, max_blocks], got {got}")
    _check_lens(seq_lens, block_table.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 token, got {chunk_size}")


def _check_scores(q: Tensor, bounds: Tensor, seq_lens: Tensor, chunk_size: int) -> None:
    if bounds.ndim != 5 or bounds.shape[2] != 2 or not bounds.is_contiguous():
        raise ValueError(
            f"bounds: expected contiguous [num_seqs, num_chunks, 2, num_kv_heads, head_dim], got {list(bounds.shape)}"
        )
    num_seqs, _, _, num_kv_heads, head_dim = bounds.shape
    if q.ndim != 3 or (q.shape[0], q.shape[2]) != (num_seqs, head_dim) or q.stride(2) != 1:
        raise ValueError(
            f"q: expected [{num_seqs}, num_q_heads, {head_dim}] with contiguous features, got {list(q.shape)} with "
            f"strides {list(q.stride())}"
        )
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} KV heads, got {q.shape[1]} query heads")
    _check_lens(seq_lens, num_seqs)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 token, got {chunk_size}")


def _check_lens(seq_lens: Tensor, num_seqs: int) -> None:
    if seq_lens.dtype != torch.int32 or seq_lens.shape != (num_seqs,) or not seq_lens.is_contiguous():
        got = f"{seq_lens.dtype} {list(seq_lens.shape)} with strides {list(seq_lens.stride())}"
        raise ValueError(f"seq_lens: expected contiguous int32 [{num_seqs}], got {got}")
