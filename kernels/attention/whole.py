"""Attention of many new tokens per seq over prefix and chunk: a program takes one query tile through all of its keys.

With `batch_invariant` it takes every seq, including decode and verify rows: one tile shape for a model, key tiles at
fixed positions, one program from a row's first key to its last. So a row's bits depend only on its own query and keys.
"""

import math

import triton
from triton import language as tl

from kernels.attention.call import AttentionCall
from kernels.attention.core import attend_keys, open_query_tile, store_rows
from kernels.attention.schedule import WholeWork, padded


@triton.jit(do_not_specialize=["q_token_stride", "q_head_stride", "table_stride"])
def prefill_attention_kernel(
    out_ptr,  # [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM]
    lse_ptr,  # fp32 [num_tokens, NUM_KV_HEADS * GROUP], or None
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    ancestors_ptr,  # or None
    query_tiles_ptr,  # as in WholeWork
    q_token_stride,
    q_head_stride,
    table_stride,
    scale,  # softmax_scale / ln 2
    k_scales_ptr,  # fp32 [NUM_KV_HEADS], for caches in FP8; or None
    v_scales_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_PASS: tl.constexpr,  # mask all key tiles, even those that every row sees completely
):
    query_tile = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    v_scale_ptr = v_scales_ptr
    if k_scales_ptr is not None:
        scale *= tl.load(k_scales_ptr + kv_head)
        v_scale_ptr += kv_head
    q, rows, seq, keys = open_query_tile(
        query_tiles_ptr + 2 * query_tile,
        kv_head,
        (q_ptr, q_token_stride, q_head_stride),
        (seq_lens_ptr, cu_seqlens_q_ptr),
        ancestors_ptr,
        GROUP,
        HEAD_DIM,
        DIM,
        WINDOW,
        ROWS,
    )
    softmax = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, DIM], tl.float32),
    )
    cache = (k_ptr, v_ptr, table_ptr + seq[0].to(tl.int64) * table_stride)
    # Key tiles [begin, bulk_begin) reach beyond a row's window. All rows see all of [bulk_begin, bulk_end).
    begin = keys[0] // KEYS
    end = tl.cdiv(keys[1], KEYS)
    bulk_begin = begin
    bulk_end = begin
    if not ONE_PASS:
        bulk_end = (seq[2] + tl.load(query_tiles_ptr + 2 * query_tile + 1) + 1) // KEYS
        if WINDOW is not None:
            bulk_begin = tl.minimum(tl.cdiv(tl.maximum(keys[1] - WINDOW, 0), KEYS), end)
            bulk_end = tl.maximum(bulk_begin, bulk_end)
            softmax = attend_keys(
                q, softmax, cache, kv_head, (begin, bulk_begin), rows, seq, keys, ancestors_ptr, scale,
                BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIM, WINDOW, KEYS, True,
            )  # fmt: skip
        softmax = attend_keys(
            q, softmax, cache, kv_head, (bulk_begin, bulk_end), rows, seq, keys, ancestors_ptr, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIM, WINDOW, KEYS, False,
        )  # fmt: skip
    softmax = attend_keys(
        q, softmax, cache, kv_head, (bulk_end, end), rows, seq, keys, ancestors_ptr, scale,
        BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIM, WINDOW, KEYS, True,
    )  # fmt: skip
    store_rows(out_ptr, lse_ptr, rows, softmax, v_scale_ptr, NUM_KV_HEADS * GROUP, HEAD_DIM, DIM)


def launch_whole(call: AttentionCall, work: WholeWork, *, one_pass: bool) -> None:
    """Write the results of the seqs in `work` to call.out and call.lse.

    one_pass: masked and unmasked key tiles go through the same instructions. batch_invariant needs that, because a
    compiler may round them differently.
    """
    head_dim = call.q.shape[2]
    prefill_attention_kernel[(len(work.query_tiles) * call.num_kv_heads,)](
        call.out,
        call.lse,
        call.q,
        *call.numbers_of_caches(),
        call.block_table,
        call.seq_lens,
        call.cu_seqlens_q,
        call.ancestors,
        work.query_tiles,
        call.q.stride(0),
        call.q.stride(1),
        call.block_table.stride(0),
        call.softmax_scale / math.log(2),
        None if call.kv_scales is None else call.kv_scales.k,
        None if call.kv_scales is None else call.kv_scales.v,
        NUM_KV_HEADS=call.num_kv_heads,
        GROUP=call.group,
        HEAD_DIM=head_dim,
        DIM=padded(head_dim),
        BLOCK_SIZE=call.k_cache.shape[1],
        WINDOW=call.sliding_window,
        ROWS=work.tiling.rows,
        KEYS=work.tiling.keys,
        ONE_PASS=one_pass,
        num_warps=work.tiling.num_warps,
        num_stages=work.tiling.num_stages,
        enable_fp_fusion=True,  # explicit, because its default changes in Triton 3.10
    )
