"""Copies of KV in all layers at once: blocks to a staging buffer and back, block to block, and slot to slot.

The caches of the layers are tensors of their own, so a kernel finds them through a table of their addresses, keys and
values of layer 0 first. One launch then does what would be two small launches a layer. Everything is copied as 32-bit
words: bits stay as they are, NaN and all, whatever the dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton

KVCaches = Sequence[tuple[Tensor, Tensor]]  # of each layer: k, v [num_blocks, block_size, num_kv_heads, head_dim]
WORD_BYTES = 4
TILE_WORDS = 2048  # 8 KiB a program: 16 bytes for each of 128 threads, four times
MOVES_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAddresses:
    """Where the caches of all layers lie: worked out and checked once, valid while the tensors live."""

    table: Tensor  # int64 [2 * num_layers], on the device of the caches: k of layer 0, v of layer 0, k of layer 1, ...
    block_words: int
    slot_words: int


def cache_addresses(kv_caches: KVCaches) -> CacheAddresses:
    """The addresses for calls with these caches. Raises ValueError where the caches are not of one shape and kind."""
    k_cache = _check_caches(kv_caches)
    addresses = [cache.data_ptr() for layer in kv_caches for cache in layer]
    slot_bytes = k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
    if slot_bytes % WORD_BYTES:
        raise ValueError(f"kv_caches: expected slots of a multiple of {WORD_BYTES} bytes, got {slot_bytes}")
    slot_words = slot_bytes // WORD_BYTES
    return CacheAddresses(
        table=torch.tensor(addresses, dtype=torch.int64, device=k_cache.device),
        block_words=k_cache.shape[1] * slot_words,
        slot_words=slot_words,
    )


def copy_blocks(
    kv_caches: KVCaches, src_blocks: Tensor, dst_blocks: Tensor, *, addresses: CacheAddresses | None = None
) -> None:
    """Copy block src_blocks[i] over block dst_blocks[i] in all layers, keys and values.

    src_blocks, dst_blocks: int64 [num_copies] on the device of the caches; a source may occur often, a destination
    once, and none in both. addresses: from cache_addresses for these caches; without it every call works them out,
    which on a GPU costs a copy from the host. Raises ValueError naming the argument that does not fit.
    """
    _check_pairs("src_blocks", src_blocks, "dst_blocks", dst_blocks)
    if not runs_triton(src_blocks):
        _check_caches(kv_caches)
        copy_blocks_reference(kv_caches, src_blocks, dst_blocks)
        return
    addresses = addresses or cache_addresses(kv_caches)
    if not src_blocks.numel():
        return
    grid = (src_blocks.numel(), addresses.table.numel(), triton.cdiv(addresses.block_words, TILE_WORDS))
    _copy_blocks_kernel[grid](addresses.table, src_blocks, dst_blocks, addresses.block_words, TILE_WORDS)


def copy_blocks_reference(kv_caches: KVCaches, src_blocks: Tensor, dst_blocks: Tensor) -> None:
    """The definition, one cache at a time."""
    for layer in kv_caches:
        for cache in layer:
            cache.index_copy_(0, dst_blocks, cache.index_select(0, src_blocks))


@triton.jit
def _words_at(table_ptr, part):
    """The cache of a part as a pointer to its words. torch aligns what it allocates."""
    return tl.multiple_of(tl.load(table_ptr + part).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _copy_blocks_kernel(table_ptr, src_ptr, dst_ptr, block_words, TILE: tl.constexpr):
    copy = tl.program_id(0)
    cache_ptr = _words_at(table_ptr, tl.program_id(1))
    word = tl.program_id(2) * TILE + tl.arange(0, TILE)
    src = tl.load(src_ptr + copy) * block_words
    dst = tl.load(dst_ptr + copy) * block_words
    words = tl.load(cache_ptr + src + word, mask=word < block_words)
    tl.store(cache_ptr + dst + word, words, mask=word < block_words)


def _check_caches(kv_caches: KVCaches) -> Tensor:
    """The first cache, if all are contiguous and alike."""
    if not kv_caches:
        raise ValueError("kv_caches: expected at least one layer, got none")
    first = kv_caches[0][0]
    kind = (first.shape, first.dtype, first.device)
    if first.ndim != 4:
        raise ValueError(
            f"kv_caches: expected [num_blocks, block_size, num_kv_heads, head_dim], got {list(first.shape)}"
        )
    for number, layer in enumerate(kv_caches):
        for name, cache in zip("kv", layer, strict=True):
            if (cache.shape, cache.dtype, cache.device) != kind or not cache.is_contiguous():
                raise ValueError(
                    f"kv_caches: expected contiguous {list(first.shape)} {first.dtype} on {first.device} like the "
                    f"first, got {list(cache.shape)} {cache.dtype} on {cache.device} with strides "
                    f"{list(cache.stride())} as {name} of layer {number}"
                )
    return first


def _check_pairs(src_name: str, src: Tensor, dst_name: str, dst: Tensor) -> None:
    for name, x in ((src_name, src), (dst_name, dst)):
        if x.ndim != 1 or x.dtype != torch.int64 or not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous int64 [n], got {x.dtype} {list(x.shape)}")
    if src.shape != dst.shape or src.device != dst.device:
        raise ValueError(
            f"{dst_name}: expected {list(src.shape)} on {src.device} like {src_name}, got {list(dst.shape)} on "
            f"{dst.device}"
        )
