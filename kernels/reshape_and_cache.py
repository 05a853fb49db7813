"""RoPE on q and k, and the write of k and v into the paged KV cache (arXiv 2104.09864, NeoX layout)."""

import torch
from torch import Tensor


def gather_rotary(cos_sin_cache: Tensor, positions: Tensor) -> Tensor:
    """The factors by which tokens at these positions rotate, once a step for all layers.

    cos_sin_cache: fp32 [max_position, rotary_dim], cosines in its first half, sines in its second. positions: int64
    [num_tokens]. Returns fp32 [2, num_tokens, 1, rotary_dim]: (cos, cos) and (-sin, sin), so that a head x rotates as
    x * (cos, cos) + swapped halves of x * (-sin, sin). Raises ValueError naming the argument that does not fit.
    """
    if cos_sin_cache.ndim != 2 or cos_sin_cache.dtype != torch.float32 or cos_sin_cache.shape[1] % 2:
        got = f"{cos_sin_cache.dtype} {list(cos_sin_cache.shape)}"
        raise ValueError(f"cos_sin_cache: expected fp32 [max_position, rotary_dim] with an even rotary_dim, got {got}")
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(f"positions: expected int64 [num_tokens], got {positions.dtype} {list(positions.shape)}")
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
) -> None:
    """Rotate q IN PLACE; write rotated k, and v, into their slots of the cache. k and v are left as they are.

    q: [num_tokens, num_q_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]; any strides, so slices of one
    fused projection need no copy. rotary: fp32 [2, num_tokens, 1, rotary_dim] of gather_rotary; the first rotary_dim
    features of each head are rotated in fp32, the others pass. slot_mapping: int64 [num_tokens]; slot = block_id *
    block_size + offset, and the keys and values of a token with slot -1 are not written. No slot may occur twice.
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, written in place.
    Raises ValueError naming the argument that does not fit.
    """
    _check(q, k, v, rotary, slot_mapping, k_cache, v_cache)
    if q.device.type == "cpu":
        reshape_and_cache_cpu(q, k, v, rotary, slot_mapping, k_cache, v_cache)
    else:
        reshape_and_cache_reference(q, k, v, rotary, slot_mapping, k_cache, v_cache)


def reshape_and_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """The definition: rotate the pairs (x[i], x[i + rotary_dim / 2]) and store token by slot."""
    half = rotary.shape[-1] // 2
    cos, sin = rotary[0, ..., :half], rotary[1, ..., half:]  # [num_tokens, 1, rotary_dim / 2] each

    def rotated(x: Tensor) -> Tensor:
        first, second, rest = x.float().split_with_sizes([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)

    q.copy_(rotated(q))
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    k_cache.view(-1, *k_cache.shape[2:])[slots] = rotated(k)[written]
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v[written]


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
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} like q, got {x.dtype}")
    if slot_mapping.shape != (num_tokens,) or slot_mapping.dtype != torch.int64:
        got = f"{slot_mapping.dtype} {list(slot_mapping.shape)}"
        raise ValueError(f"slot_mapping: expected int64 [{num_tokens}], got {got}")
    if rotary.shape[:-1] != (2, num_tokens, 1) or rotary.dtype != torch.float32 or rotary.shape[-1] > head_dim:
        got = f"{rotary.dtype} {list(rotary.shape)}"
        raise ValueError(f"rotary: expected fp32 [2, {num_tokens}, 1, at most {head_dim}], got {got}")
