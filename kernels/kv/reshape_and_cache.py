"""RoPE on q and k, and the write of k and v into the paged KV cache (arXiv 2104.09864, NeoX layout)."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.kv.fp8 import KVScales, to_fp8
from kernels.native import rows as native

TILE_ELEMENTS = 1024  # half a head times ROWS heads: each lane loads 16 bytes of each half at once, in 16-bit types
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_tokens"])
def gather_rotary_kernel(
    cache_ptr, position_ptr, out_ptr, cache_stride, position_stride, num_tokens, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < HALF
    row_ptr = cache_ptr + tl.load(position_ptr + token * position_stride) * cache_stride + column
    cos = tl.load(row_ptr, mask=mask)
    sin = tl.load(row_ptr + HALF, mask=mask)
    cos_ptr = out_ptr + token * (2 * HALF) + column
    sin_ptr = cos_ptr + num_tokens.to(tl.int64) * (2 * HALF)
    tl.store(cos_ptr, cos, mask=mask)
    tl.store(cos_ptr + HALF, cos, mask=mask)
    tl.store(sin_ptr, -sin, mask=mask)
    tl.store(sin_ptr + HALF, sin, mask=mask)


@triton.jit
def _load_rotated(head_ptr, stride, cos, sin, column, mask, HALF: tl.constexpr):
    """Both halves of some heads, rotated, in fp32: [ROWS, BLOCK_HALF] each."""
    first = tl.load(head_ptr + column * stride, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(head_ptr + (column + HALF) * stride, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _cached(x, scale, FP8: tl.constexpr):
    """x as the cache takes it. NaN stays NaN."""
    if FP8:
        x = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    return x


@triton.jit(do_not_specialize=["num_tokens"])
def reshape_and_cache_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rotary_ptr,
    slot_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,  # fp32 [NUM_KV_HEADS], for caches in FP8; or None
    v_scales_ptr,
    num_tokens,
    q_stride_token,
    q_stride_head,
    q_stride,
    k_stride_token,
    k_stride_head,
    k_stride,
    v_stride_token,
    v_stride_head,
    v_stride,
    rotary_stride_sin,  # distance from cosines to sines
    rotary_stride_token,
    slot_stride,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the features that rotate
    ROWS: tl.constexpr,  # heads per program, of one token or of several
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # for the features that do not rotate; 0: there are none
):
    """The first programs rotate heads of q, the others write heads of k and v."""
    num_q_programs = tl.cdiv(num_tokens * NUM_Q_HEADS, ROWS)
    is_q = tl.program_id(0) < num_q_programs
    num_heads = tl.where(is_q, NUM_Q_HEADS, NUM_KV_HEADS)
    first_row = (tl.program_id(0) - tl.where(is_q, 0, num_q_programs)) * ROWS
    row = first_row + tl.arange(0, ROWS)[:, None]
    token, head = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    row_mask = token < num_tokens
    mask = row_mask & (column < HALF)
    cos_ptr = rotary_ptr + token * rotary_stride_token + column
    cos = tl.load(cos_ptr, mask=mask, other=0.0)
    sin = tl.load(cos_ptr + rotary_stride_sin + HALF, mask=mask, other=0.0)  # the second half has the unchanged sign

    if is_q:
        head_ptr = q_ptr + token * q_stride_token + head * q_stride_head
        first, second = _load_rotated(head_ptr, q_stride, cos, sin, column, mask, HALF)
        tl.store(head_ptr + column * q_stride, first, mask=mask)
        tl.store(head_ptr + (column + HALF) * q_stride, second, mask=mask)
    else:
        slot = tl.load(slot_ptr + token * slot_stride, mask=row_mask, other=-1)
        head_ptr = k_ptr + token * k_stride_token + head * k_stride_head
        v_head_ptr = v_ptr + token * v_stride_token + head * v_stride_head
        first, second = _load_rotated(head_ptr, k_stride, cos, sin, column, mask, HALF)
        v_first = tl.load(v_head_ptr + column * v_stride, mask=mask)
        v_second = tl.load(v_head_ptr + (column + HALF) * v_stride, mask=mask)
        written = mask & (slot >= 0)
        target = (slot * NUM_KV_HEADS + head) * HEAD_DIM + column
        k_scale, v_scale = 1.0, 1.0
        if k_scales_ptr is not None:
            k_scale = tl.load(k_scales_ptr + head, mask=row_mask, other=1.0)
            v_scale = tl.load(v_scales_ptr + head, mask=row_mask, other=1.0)
        FP8: tl.constexpr = k_scales_ptr is not None
        tl.store(k_cache_ptr + target, _cached(first, k_scale, FP8), mask=written)
        tl.store(k_cache_ptr + target + HALF, _cached(second, k_scale, FP8), mask=written)
        tl.store(v_cache_ptr + target, _cached(v_first, v_scale, FP8), mask=written)
        tl.store(v_cache_ptr + target + HALF, _cached(v_second, v_scale, FP8), mask=written)
        if BLOCK_REST > 0:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            written = (rest < HEAD_DIM) & (slot >= 0)
            target = (slot * NUM_KV_HEADS + head) * HEAD_DIM + rest
            k_rest = tl.load(head_ptr + rest * k_stride, mask=written)
            v_rest = tl.load(v_head_ptr + rest * v_stride, mask=written)
            tl.store(k_cache_ptr + target, _cached(k_rest, k_scale, FP8), mask=written)
            tl.store(v_cache_ptr + target, _cached(v_rest, v_scale, FP8), mask=written)


def gather_rotary(cos_sin_cache: Tensor, positions: Tensor) -> Tensor:
    """The rotation factors of tokens at these positions, computed once per step for all layers.

    cos_sin_cache: fp32 [max_position, rotary_dim], cosines in its first half, sines in its second. positions: int64
    [num_tokens]. Returns fp32 [2, num_tokens, 1, rotary_dim]: (cos, cos) and (-sin, sin), so that a head x rotates as
    x * (cos, cos) + swapped halves of x * (-sin, sin). Raises ValueError naming the argument that does not fit.
    """
    if cos_sin_cache.ndim != 2 or cos_sin_cache.dtype != torch.float32 or cos_sin_cache.shape[1] % 2:
        got = f"{cos_sin_cache.dtype} {list(cos_sin_cache.shape)}"
        raise ValueError(f"cos_sin_cache: expected fp32 [max_position, rotary_dim] with an even rotary_dim, got {got}")
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(f"positions: expected int64 [num_tokens], got {positions.dtype} {list(positions.shape)}")
    if cos_sin_cache.stride(1) != 1:
        raise ValueError(f"cos_sin_cache: expected contiguous rows, got strides {list(cos_sin_cache.stride())}")
    if not runs_triton(positions):
        return gather_rotary_reference(cos_sin_cache, positions)
    num_tokens, rotary_dim = positions.shape[0], cos_sin_cache.shape[1]
    out = torch.empty(2, num_tokens, 1, rotary_dim, device=positions.device)
    strides = (cos_sin_cache.stride(0), positions.stride(0))
    blocks = {"HALF": rotary_dim // 2, "BLOCK": triton.next_power_of_2(rotary_dim // 2)}
    if out.numel():
        gather_rotary_kernel[(num_tokens,)](cos_sin_cache, positions, out, *strides, num_tokens, **blocks, num_warps=1)
    return out


def gather_rotary_reference(cos_sin_cache: Tensor, positions: Tensor) -> Tensor:
    """The definition. It takes so few calls that the CPU uses it too."""
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def reshape_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """Rotate q IN PLACE; write rotated k, and v, into their slots of the cache. k and v are left as they are.

    q: [num_tokens, num_q_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]; any strides, so slices of one
    fused projection need no copy. rotary: fp32 [2, num_tokens, 1, rotary_dim] of gather_rotary; the first rotary_dim
    features of each head are rotated in fp32, the others pass. slot_mapping: int64 [num_tokens]; slot = block_id *
    block_size + offset, and the keys and values of a token with slot -1 are not written. No slot may occur twice.
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, written in place, in q's dtype; with
    kv_scales uint8, the bits of FP8, rounded from fp32 (kernels/kv/fp8.py).
    Raises ValueError naming the argument that does not fit.
    """
    _check(q, k, v, rotary, slot_mapping, k_cache, v_cache, kv_scales)
    if runs_triton(q):
        _launch_reshape_and_cache(q, k, v, rotary, slot_mapping, k_cache, v_cache, kv_scales)
        return
    if kv_scales is not None:
        reshape_and_cache_reference(q, k, v, rotary, slot_mapping, k_cache, v_cache, kv_scales)
        return
    if native.can_compute(q, k, v) and slot_mapping.is_contiguous():
        run = native.native_rotate_and_cache
    else:
        run = reshape_and_cache_cpu
    run(q, k, v, rotary, slot_mapping, k_cache, v_cache)


def reshape_and_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """The definition: rotate the pairs (x[i], x[i + rotary_dim / 2]) and store token by slot."""
    half = rotary.shape[-1] // 2
    cos, sin = rotary[0, ..., :half], rotary[1, ..., half:]  # [num_tokens, 1, rotary_dim / 2] each

    def rotated(x: Tensor) -> Tensor:
        first, second, rest = x.float().split_with_sizes([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    q.copy_(rotated(q))
    new_k, new_v = rotated(k).to(k.dtype), v
    if kv_scales is not None:
        new_k, new_v = to_fp8(rotated(k), kv_scales.k), to_fp8(v, kv_scales.v)
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    k_cache.view(-1, *k_cache.shape[2:])[slots] = new_k[written]
    v_cache.view(-1, *v_cache.shape[2:])[slots] = new_v[written]


def reshape_and_cache_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """The same bits in the fewest calls."""
    rotary_dim = rotary.shape[-1]
    if rotary_dim == q.shape[-1]:
        q.copy_(_rotated(q, rotary))
        new_k = _rotated(k, rotary).to(k.dtype)
    else:
        q[..., :rotary_dim].copy_(_rotated(q[..., :rotary_dim], rotary))
        new_k = torch.cat([_rotated(k[..., :rotary_dim], rotary).to(k.dtype), k[..., rotary_dim:]], dim=-1)
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        written = (slot_mapping >= 0).nonzero().squeeze(1)
        new_k, v, slot_mapping = new_k[written], v[written], slot_mapping[written]
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, new_k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def _launch_reshape_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales: KVScales | None,
) -> None:
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], rotary.shape[-1] // 2
    if num_tokens == 0:
        return
    block_half = triton.next_power_of_2(half)
    rows = max(1, TILE_ELEMENTS // block_half)
    num_programs = triton.cdiv(num_tokens * num_q_heads, rows) + triton.cdiv(num_tokens * num_kv_heads, rows)
    reshape_and_cache_kernel[(num_programs,)](
        q,
        k,
        v,
        rotary,
        slot_mapping,
        k_cache if kv_scales is None else k_cache.view(torch.float8_e4m3fn),
        v_cache if kv_scales is None else v_cache.view(torch.float8_e4m3fn),
        None if kv_scales is None else kv_scales.k,
        None if kv_scales is None else kv_scales.v,
        num_tokens,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *rotary.stride()[:2],
        slot_mapping.stride(0),
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        ROWS=rows,
        BLOCK_HALF=block_half,
        BLOCK_REST=triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # the bits of the reference: keys in the cache are the same on every device
    )


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate all features of x [num_tokens, num_heads, rotary_dim] into a new fp32 tensor."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.mul(x, rotary[0]).add_(torch.mul(swapped, rotary[1]))  # fp32, since rotary is


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales: KVScales | None,
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q: expected [num_tokens, num_q_heads, head_dim], got {list(q.shape)}")
    num_tokens, _, head_dim = q.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4 or cache.shape != k_cache.shape or not cache.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous [num_blocks, block_size, num_kv_heads, {head_dim}], got "
                f"{list(cache.shape)} with strides {list(cache.stride())}"
            )
    for name, x in (("k", k), ("v", v)):
        if x.shape != (num_tokens, k_cache.shape[2], head_dim):
            expected = [num_tokens, k_cache.shape[2], head_dim]
            raise ValueError(f"{name}: expected {expected} for q and k_cache, got {list(x.shape)}")
    cached, why = (q.dtype, "like q") if kv_scales is None else (torch.uint8, "with kv_scales")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} like q, got {x.dtype}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != cached:
            raise ValueError(f"{name}: expected {cached} {why}, got {x.dtype}")
    if slot_mapping.shape != (num_tokens,) or slot_mapping.dtype != torch.int64:
        got = f"{slot_mapping.dtype} {list(slot_mapping.shape)}"
        raise ValueError(f"slot_mapping: expected int64 [{num_tokens}], got {got}")
    fits = rotary.ndim == 4 and rotary.shape[:-1] == (2, num_tokens, 1) and rotary.shape[-1] <= head_dim
    if not fits or rotary.dtype != torch.float32 or rotary.stride(-1) != 1:
        got = f"{rotary.dtype} {list(rotary.shape)} with strides {list(rotary.stride())}"
        raise ValueError(f"rotary: expected fp32 [2, {num_tokens}, 1, at most {head_dim}], got {got}")
