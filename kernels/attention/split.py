"""Attention of few new tokens per seq over many keys: equal stretches of key tiles for all programs, in one launch.

Stream-K, LeanAttention (arXiv 2405.10480): the key tiles of all query tiles of all KV heads form one sequence, and
program p of P takes the tiles [p * N / P, (p + 1) * N / P). A query tile whose keys fall into several stretches is
*split*: each of its programs leaves its part in scratch memory and increments a counter. The program that completes the
count merges the parts in order of position, whatever the order of their arrival. No program waits for another, so they
may run in any order and any number at a time.
"""

import math

import triton
from triton import language as tl

from kernels.attention.call import AttentionCall
from kernels.attention.core import attend_keys, open_query_tile, store_rows
from kernels.attention.schedule import SplitWork, padded


@triton.jit
def _leave_part(part_ptr, stats_ptr, slot, valid, softmax, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write a part of a split query tile to scratch: [slot, ROWS, DIM] and [slot, 2, ROWS]."""
    peak, total, acc = softmax
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    stats = stats_ptr + slot * 2 * ROWS + row
    tl.store(stats, peak, mask=valid)
    tl.store(stats + ROWS, total, mask=valid)
    part = part_ptr + (slot.to(tl.int64) * ROWS + row)[:, None] * DIM + feature[None, :]
    tl.store(part, acc, mask=valid[:, None])


@triton.jit
def _merge_parts(
    part_ptr, stats_ptr, first_slot, first_program, last_program, valid, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """(peak, total, acc) of a split query tile. Its first part may be its program's second; all others are first."""
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for program in range(first_program, last_program + 1):
        slot = tl.where(program == first_program, first_slot, 2 * program)
        # .cg reads the cache that all multiprocessors share; it holds the parts of other programs.
        stats = stats_ptr + slot * 2 * ROWS + row
        part_peak = tl.load(stats, mask=valid, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stats + ROWS, mask=valid, other=0.0, cache_modifier=".cg")
        part = part_ptr + (slot.to(tl.int64) * ROWS + row)[:, None] * DIM + feature[None, :]
        part_acc = tl.load(part, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, part_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, part_decay = tl.exp2(peak - base), tl.exp2(part_peak - base)
        total = total * decay + part_total * part_decay
        acc = acc * decay[:, None] + part_acc * part_decay[:, None]
        peak = new_peak
    return peak, total, acc


@triton.jit(do_not_specialize=["q_token_stride", "q_head_stride", "table_stride", "num_query_tiles"])
def paged_attention_kernel(
    out_ptr,  # [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM]
    lse_ptr,  # fp32 [num_tokens, NUM_KV_HEADS * GROUP], or None
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    ancestors_ptr,  # or None
    query_tiles_ptr,  # from here on as in SplitWork
    tile_starts_ptr,
    first_query_tiles_ptr,
    num_busy_ptr,
    parts_ptr,
    part_stats_ptr,
    counters_ptr,
    q_token_stride,
    q_head_stride,
    table_stride,
    num_query_tiles,
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
):
    program = tl.program_id(0)
    num_programs = tl.load(num_busy_ptr)
    tiles_of_head = tl.load(tile_starts_ptr + num_query_tiles)
    num_tiles = tiles_of_head.to(tl.int64) * NUM_KV_HEADS
    start = program * num_tiles // num_programs
    stop = (program + 1) * num_tiles // num_programs
    stop = tl.where(program < num_programs, stop, start)  # the others have nothing to do
    kv_head = (start // tiles_of_head).to(tl.int32)
    query_tile = tl.load(first_query_tiles_ptr + program)
    position = start
    while position < stop:
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
        # Its key tiles are [own_start, own_stop) of the whole sequence; this program has [position, part_stop).
        own_start = kv_head * tiles_of_head.to(tl.int64) + tl.load(tile_starts_ptr + query_tile)
        own_stop = kv_head * tiles_of_head.to(tl.int64) + tl.load(tile_starts_ptr + query_tile + 1)
        part_stop = tl.minimum(own_stop, stop)
        first_key_tile = keys[0] // KEYS
        head_scale = scale
        v_scale_ptr = v_scales_ptr
        if k_scales_ptr is not None:
            head_scale = scale * tl.load(k_scales_ptr + kv_head)
            v_scale_ptr = v_scales_ptr + kv_head
        softmax = attend_keys(
            q,
            (
                tl.full([ROWS], float("-inf"), tl.float32),
                tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS, DIM], tl.float32),
            ),
            (k_ptr, v_ptr, table_ptr + seq[0].to(tl.int64) * table_stride),
            kv_head,
            (
                first_key_tile + (position - own_start).to(tl.int32),
                first_key_tile + (part_stop - own_start).to(tl.int32),
            ),
            rows,
            seq,
            keys,
            ancestors_ptr,
            head_scale,
            BLOCK_SIZE,
            NUM_KV_HEADS,
            HEAD_DIM,
            DIM,
            WINDOW,
            KEYS,
            True,
        )
        first_program = (((own_start + 1) * num_programs - 1) // num_tiles).to(tl.int32)
        last_program = ((own_stop * num_programs - 1) // num_tiles).to(tl.int32)
        is_complete = True
        if first_program < last_program:
            slot = 2 * program + (position > start).to(tl.int32)
            _leave_part(parts_ptr, part_stats_ptr, slot, rows[2], softmax, ROWS, DIM)
            tl.debug_barrier()  # all threads of the program have written before one of them increments the counter
            counter = counters_ptr + kv_head * num_query_tiles + query_tile
            num_before = tl.atomic_add(counter, 1, sem="acq_rel")
            is_complete = num_before == last_program - first_program
            if is_complete:
                tl.store(counter, 0)  # as the next launch expects it
                first_slot = 2 * first_program + (own_start > first_program * num_tiles // num_programs).to(tl.int32)
                softmax = _merge_parts(
                    parts_ptr, part_stats_ptr, first_slot, first_program, last_program, rows[2], ROWS, DIM
                )
        if is_complete:
            store_rows(out_ptr, lse_ptr, rows, softmax, v_scale_ptr, NUM_KV_HEADS * GROUP, HEAD_DIM, DIM)
        position = part_stop
        query_tile += 1
        if query_tile == num_query_tiles:
            query_tile = 0
            kv_head += 1


def launch_split(call: AttentionCall, work: SplitWork) -> None:
    """Write the results of the seqs in `work` to call.out and call.lse."""
    head_dim = call.q.shape[2]
    paged_attention_kernel[(work.num_programs,)](
        call.out,
        call.lse,
        call.q,
        *call.numbers_of_caches(),
        call.block_table,
        call.seq_lens,
        call.cu_seqlens_q,
        call.ancestors,
        work.query_tiles,
        work.tile_starts,
        work.first_query_tiles,
        work.num_busy,
        work.parts,
        work.part_stats,
        work.counters,
        call.q.stride(0),
        call.q.stride(1),
        call.block_table.stride(0),
        len(work.query_tiles),
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
        num_warps=work.tiling.num_warps,
        num_stages=work.tiling.num_stages,
        enable_fp_fusion=True,  # explicit, because its default changes in Triton 3.10
    )
