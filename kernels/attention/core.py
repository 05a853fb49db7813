"""What the attention kernels share, in Triton: the rows of a query tile, and the loop of a tile over its keys.

A *query tile* is some consecutive new tokens of one seq and the query heads of one KV head, row = token * GROUP + head,
padded to ROWS. A *key tile* is the KEYS positions [i * KEYS, (i + 1) * KEYS) of a seq. Tile borders have fixed
positions, so a row visits the same tiles in the same order whatever else is computed. For each key tile

    scores  = q k^T * scale                 hidden keys get -inf
    peak'   = max(peak, max(scores))        decay = 2^(peak - peak')
    weights = 2^(scores - peak')
    total   = total * decay + sum(weights)
    acc     = acc * decay + weights v

and acc / total at the end. This is the online softmax of FlashAttention (arXiv 2205.14135), with scores in units of
log 2. A tile of which a row sees nothing does not change its bits: decay is 1 and all weights are 0.
"""

import triton
from triton import language as tl

from kernels.interpreter_numpy import accept_loop_bounds

accept_loop_bounds()

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def popcount(words):
    """The number of bits set in int64 words. Shifts are arithmetic, and the masks also remove copies of the sign."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    words = words + (words >> 8)
    words = words + (words >> 16)
    return ((words + (words >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def key_range(seq_len, num_new, first_new, WINDOW: tl.constexpr, TREE: tl.constexpr, TOKENS: tl.constexpr):
    """Positions [begin, end) of its seq that the query tile starting at new token `first_new` sees.

    A tree node has position num_prefix + depth, at least that of the first new token, and may see any new token.
    """
    num_prefix = seq_len - num_new
    begin = 0
    if TREE:
        end = seq_len
        if WINDOW is not None:
            begin = tl.maximum(num_prefix - WINDOW + 1, 0)
    else:
        end = tl.minimum(num_prefix + first_new + TOKENS, seq_len)
        if WINDOW is not None:
            begin = tl.maximum(num_prefix + first_new - WINDOW + 1, 0)
    return begin, end


@triton.jit
def query_positions(
    ancestors_ptr,  # int64 [num_tokens], or None
    token,  # [ROWS], of the batch
    valid,  # [ROWS]
    num_prefix,
    new_token,  # [ROWS], of the seq
):
    """Returns ([ROWS] position of each query in its seq, [ROWS] its word of ancestors or 0)."""
    words = tl.zeros_like(new_token)
    positions = num_prefix + new_token
    if ancestors_ptr is not None:
        words = tl.load(ancestors_ptr + token, mask=valid, other=0)
        positions = num_prefix + popcount(words) - 1
    return positions, words


@triton.jit
def open_query_tile(
    query_tile_ptr,  # int32 [2]: seq, first of its new tokens in the tile
    kv_head,
    queries,  # (pointer to [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM], token stride, head stride)
    lengths,  # (seq_lens_ptr, cu_seqlens_q_ptr)
    ancestors_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Load a query tile: (q [ROWS, DIM], rows, seq, keys). q is 0 in padded rows and features.

    rows: (token in the batch, query head, whether it is a real row, position, word of ancestors), [ROWS] each.
    seq: (its index, its first token in the batch, length of its prefix, its length). keys: the result of key_range.
    """
    q_ptr, q_token_stride, q_head_stride = queries
    seq_lens_ptr, cu_seqlens_q_ptr = lengths
    seq = tl.load(query_tile_ptr)
    first_new = tl.load(query_tile_ptr + 1)
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    num_new = tl.load(cu_seqlens_q_ptr + seq + 1) - first_token
    seq_len = tl.load(seq_lens_ptr + seq)
    num_prefix = seq_len - num_new
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    new_token = first_new + row // GROUP
    valid = (row // GROUP < ROWS // GROUP) & (new_token < num_new)
    token = first_token + new_token
    head = kv_head * GROUP + row % GROUP
    q_offsets = token.to(tl.int64) * q_token_stride + head * q_head_stride
    q_mask = valid[:, None] & (feature < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_offsets[:, None] + feature[None, :], mask=q_mask, other=0.0)
    positions, words = query_positions(ancestors_ptr, token, valid, num_prefix, new_token)
    keys = key_range(seq_len, num_new, first_new, WINDOW, ancestors_ptr is not None, ROWS // GROUP)
    return q, (token, head, valid, positions, words), (seq, first_token, num_prefix, seq_len), keys


@triton.jit
def visible_keys(
    ancestors_ptr,
    first_token,  # of the seq, in the batch
    num_prefix,
    seq_len,
    positions,  # [ROWS], from query_positions
    words,  # [ROWS]
    slots,  # [KEYS], positions in the seq
    WINDOW: tl.constexpr,
):
    """Which keys each row sees: [ROWS, KEYS]."""
    key_positions = slots
    if ancestors_ptr is not None:
        index = slots - num_prefix  # among the new tokens
        is_new = (index >= 0) & (slots < seq_len)
        bit = tl.where(is_new, index, 0).to(tl.int64)
        related = ((words[:, None] >> bit[None, :]) & 1) != 0
        visible = (index < 0)[None, :] | (is_new[None, :] & related)
        if WINDOW is not None:
            own_words = tl.load(ancestors_ptr + first_token + index, mask=is_new, other=0)
            key_positions = tl.where(is_new, num_prefix + popcount(own_words) - 1, slots)
    else:
        visible = slots[None, :] <= positions[:, None]
    if WINDOW is not None:
        visible = visible & (key_positions[None, :] > positions[:, None] - WINDOW)
    return visible


@triton.jit
def attend_keys(
    q,  # [ROWS, DIM]
    softmax,  # (peak [ROWS], total [ROWS], acc [ROWS, DIM])
    cache,  # (k_ptr, v_ptr: [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM]; the seq's row of the block table)
    kv_head,
    tiles,  # (first key tile, end)
    rows,  # these three from open_query_tile; no row sees a key outside `keys`, and none is read
    seq,
    keys,
    ancestors_ptr,
    scale,  # softmax_scale / ln 2
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees all keys of all these tiles
):
    """`softmax` after it has also taken in the key tiles `tiles`.

    Slots that no row sees are not read, so their contents, NaN included, have no influence.
    """
    peak, total, acc = softmax
    k_ptr, v_ptr, blocks_ptr = cache
    tile_begin, tile_end = tiles
    _, _, _, positions, words = rows
    _, first_token, num_prefix, seq_len = seq
    key_begin, key_end = keys
    feature = tl.arange(0, DIM)
    has_feature = feature < HEAD_DIM
    for tile in range(tile_begin, tile_end):
        slots = tile * KEYS + tl.arange(0, KEYS)
        read = (slots >= key_begin) & (slots < key_end)
        block = tl.load(blocks_ptr + slots // BLOCK_SIZE, mask=read, other=0).to(tl.int64)
        offsets = ((block * BLOCK_SIZE + slots % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        k_offsets = offsets[None, :] + feature[:, None]
        k = tl.load(k_ptr + k_offsets, mask=read[None, :] & has_feature[:, None], other=0.0).to(q.dtype)  # [DIM, KEYS]
        scores = tl.dot(q, k, input_precision="ieee") * scale  # [ROWS, KEYS]
        if MASKED:
            visible = visible_keys(ancestors_ptr, first_token, num_prefix, seq_len, positions, words, slots, WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # if a row has seen nothing, -inf - -inf is NaN
        decay = tl.exp2(peak - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        v_offsets = offsets[:, None] + feature[None, :]
        v = tl.load(v_ptr + v_offsets, mask=read[:, None] & has_feature[None, :], other=0.0).to(q.dtype)  # [KEYS, DIM]
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, acc


@triton.jit
def store_rows(
    out_ptr,  # [num_tokens, num_q_heads, HEAD_DIM], contiguous
    lse_ptr,  # fp32 [num_tokens, num_q_heads], or None
    rows,  # from open_query_tile
    softmax,  # (peak [ROWS], total [ROWS], acc [ROWS, DIM])
    v_scale_ptr,  # fp32: what the values were divided by; None: nothing
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Write results and the logarithms of their softmax sums: 0 and -inf for a row that has seen nothing."""
    token, head, valid, _, _ = rows
    peak, total, acc = softmax
    feature = tl.arange(0, DIM)
    row = token.to(tl.int64) * NUM_Q_HEADS + head
    total = tl.where(total == 0.0, 1.0, total)  # acc is 0 and peak -inf there
    result = acc / total[:, None]
    if v_scale_ptr is not None:
        result *= tl.load(v_scale_ptr)
    mask = valid[:, None] & (feature < HEAD_DIM)[None, :]
    tl.store(out_ptr + row[:, None] * HEAD_DIM + feature[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (peak + tl.log2(total)) * _LN_2, mask=valid)
