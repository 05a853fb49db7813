"""Copies of KV blocks in all layers at once: to a staging buffer and back, and block to block.

Each layer's caches are separate tensors, so a kernel finds them through a table of their addresses, keys and values of
layer 0 first. One launch replaces two small launches per layer. Everything is copied as 32-bit words, so all bits stay
the same, NaN included, whatever the dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.kv.native import can_stage, native_stage_blocks

KVCaches = Sequence[tuple[Tensor, Tensor]]  # per layer: k, v [num_blocks, block_size, num_kv_heads, head_dim]
_WORD_BYTES = 4
_ALIGNED_BYTES = 16  # that a thread reads at once
TILE_WORDS = 2048  # 8 KiB per program: four times 16 bytes for each of 128 threads


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAddresses:
    """The checked addresses of the caches of all layers. Valid as long as the tensors live."""

    table: Tensor  # int64 [2 * num_layers], on the device of the caches: k of layer 0, v of layer 0, k of layer 1, ...
    block_words: int
    slot_words: int


def cache_addresses(kv_caches: KVCaches) -> CacheAddresses:
    """The addresses for calls with these caches. Raises ValueError if the caches differ in shape or kind."""
    k_cache = check_caches(kv_caches)
    addresses = [cache.data_ptr() for cache in chain.from_iterable(kv_caches)]
    slot_bytes = k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
    if slot_bytes % _WORD_BYTES:
        raise ValueError(f"kv_caches: expected slots of a multiple of {_WORD_BYTES} bytes, got {slot_bytes}")
    if unaligned := [address for address in addresses if address % _ALIGNED_BYTES]:
        raise ValueError(
            f"kv_caches: expected caches at multiples of {_ALIGNED_BYTES} bytes, got one at {unaligned[0]}"
        )
    slot_words = slot_bytes // _WORD_BYTES
    return CacheAddresses(
        table=torch.tensor(addresses, dtype=torch.int64, device=k_cache.device),
        block_words=k_cache.shape[1] * slot_words,
        slot_words=slot_words,
    )


@triton.jit
def words_at(table_ptr, part):
    """The cache of a part as a pointer to its words. cache_addresses has checked that it is aligned."""
    return tl.multiple_of(tl.load(table_ptr + part).to(tl.pointer_type(tl.int32)), 16)


@triton.jit(do_not_specialize_on_alignment=["src_ptr", "dst_ptr"])
def copy_blocks_kernel(table_ptr, src_ptr, dst_ptr, block_words, TILE: tl.constexpr):
    copy = tl.program_id(0)
    cache_ptr = words_at(table_ptr, tl.program_id(1))
    word = tl.program_id(2) * TILE + tl.arange(0, TILE)
    src = tl.load(src_ptr + copy) * block_words
    dst = tl.load(dst_ptr + copy) * block_words
    words = tl.load(cache_ptr + src + word, mask=word < block_words)
    tl.store(cache_ptr + dst + word, words, mask=word < block_words)


@triton.jit(do_not_specialize_on_alignment=["block_ptr", "row_ptr"])
def stage_blocks_kernel(
    table_ptr,
    block_ptr,
    row_ptr,
    staging_ptr,
    row_stride,  # words from a row of the staging buffer to the next
    layer_stride,
    block_words,
    GATHER: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + number) if HAS_ROWS else number
    part = tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * TILE + tl.arange(0, TILE)
    cached = words_at(table_ptr, part) + tl.load(block_ptr + number) * block_words + word
    staged = staging_ptr.to(tl.pointer_type(tl.int32)) + row * row_stride + (part // 2) * layer_stride
    staged += (part % 2) * block_words + word
    if GATHER:
        tl.store(staged, tl.load(cached, mask=word < block_words), mask=word < block_words)
    else:
        tl.store(cached, tl.load(staged, mask=word < block_words), mask=word < block_words)


def copy_blocks(
    kv_caches: KVCaches, src_blocks: Tensor, dst_blocks: Tensor, *, addresses: CacheAddresses | None = None
) -> None:
    """Copy block src_blocks[i] over block dst_blocks[i] in all layers, keys and values.

    src_blocks, dst_blocks: int64 [num_copies] on the device of the caches. A source may occur often, a destination
    once, and no block in both. addresses: from cache_addresses for these caches. Without it every call computes them,
    which on a GPU costs a copy from the host. Raises ValueError naming the argument that does not fit.
    """
    check_pairs("src_blocks", src_blocks, "dst_blocks", dst_blocks)
    if not runs_triton(src_blocks):
        check_caches(kv_caches)
        copy_blocks_reference(kv_caches, src_blocks, dst_blocks)
        return
    addresses = addresses or cache_addresses(kv_caches)
    if not src_blocks.numel():
        return
    grid = (src_blocks.numel(), addresses.table.numel(), triton.cdiv(addresses.block_words, TILE_WORDS))
    copy_blocks_kernel[grid](addresses.table, src_blocks, dst_blocks, addresses.block_words, TILE_WORDS)


def gather_blocks(
    kv_caches: KVCaches,
    block_ids: Tensor,
    staging: Tensor,
    *,
    rows: Tensor | None = None,
    addresses: CacheAddresses | None = None,
) -> None:
    """Copy blocks of all layers into `staging`, one after the other, for offloading.

    block_ids: int64 [num_blocks] on the device of the caches. staging: [num_rows, num_layers, 2, block_size,
    num_kv_heads, head_dim] in dtype and device of the caches, keys before values; rows and layers may be strided (a
    few layers of a larger buffer), the rest is contiguous. A row is then one piece of memory, to be hashed, sent or
    written to disk. rows: int64 [num_blocks] on the same device, the row of each block; without it there are as many
    rows as blocks, in order. addresses: as for copy_blocks. Raises ValueError naming the argument that does not fit.
    """
    _stage_blocks(kv_caches, block_ids, staging, rows, addresses, gather=True)


def scatter_blocks(
    kv_caches: KVCaches,
    block_ids: Tensor,
    staging: Tensor,
    *,
    rows: Tensor | None = None,
    addresses: CacheAddresses | None = None,
) -> None:
    """Copy rows of `staging` into blocks of all layers: the inverse of gather_blocks. A block id may occur once."""
    _stage_blocks(kv_caches, block_ids, staging, rows, addresses, gather=False)


def copy_blocks_reference(kv_caches: KVCaches, src_blocks: Tensor, dst_blocks: Tensor) -> None:
    """The definition, one cache at a time."""
    for cache in chain.from_iterable(kv_caches):
        cache.index_copy_(0, dst_blocks, cache.index_select(0, src_blocks))


def gather_blocks_reference(
    kv_caches: KVCaches, block_ids: Tensor, staging: Tensor, rows: Tensor | None = None
) -> None:
    """The definition, one layer at a time."""
    at = slice(None) if rows is None else rows
    for number, (k_cache, v_cache) in enumerate(kv_caches):
        staging[at, number, 0] = k_cache[block_ids]
        staging[at, number, 1] = v_cache[block_ids]


def scatter_blocks_reference(
    kv_caches: KVCaches, block_ids: Tensor, staging: Tensor, rows: Tensor | None = None
) -> None:
    """The definition, one layer at a time."""
    at = slice(None) if rows is None else rows
    for number, (k_cache, v_cache) in enumerate(kv_caches):
        k_cache[block_ids] = staging[at, number, 0]
        v_cache[block_ids] = staging[at, number, 1]


def _stage_blocks(
    kv_caches: KVCaches,
    block_ids: Tensor,
    staging: Tensor,
    rows: Tensor | None,
    addresses: CacheAddresses | None,
    *,
    gather: bool,
) -> None:
    _check_staging(kv_caches, block_ids, staging, rows)
    if not block_ids.numel():
        return
    if not runs_triton(staging):
        _stage_blocks_cpu(kv_caches, block_ids, staging, rows, addresses, gather=gather)
        return
    addresses = addresses or cache_addresses(kv_caches)
    grid = (block_ids.numel(), addresses.table.numel(), triton.cdiv(addresses.block_words, TILE_WORDS))
    stage_blocks_kernel[grid](
        addresses.table,
        block_ids,
        block_ids if rows is None else rows,
        staging,
        staging.stride(0) * staging.element_size() // _WORD_BYTES,
        staging.stride(1) * staging.element_size() // _WORD_BYTES,
        addresses.block_words,
        GATHER=gather,
        HAS_ROWS=rows is not None,
        TILE=TILE_WORDS,
    )


def _stage_blocks_cpu(
    kv_caches: KVCaches,
    block_ids: Tensor,
    staging: Tensor,
    rows: Tensor | None,
    addresses: CacheAddresses | None,
    *,
    gather: bool,
) -> None:
    if addresses is None:
        check_caches(kv_caches)
    _check_range("block_ids", block_ids, kv_caches[0][0].shape[0])
    if rows is not None:
        _check_range("rows", rows, staging.shape[0])
    if can_stage():
        addresses = addresses or cache_addresses(kv_caches)
        native_stage_blocks(addresses.table, block_ids, staging, rows, gather=gather)
    elif gather:
        gather_blocks_reference(kv_caches, block_ids, staging, rows)
    else:
        scatter_blocks_reference(kv_caches, block_ids, staging, rows)


def _check_range(name: str, ids: Tensor, end: int) -> None:
    low, high = (int(limit) for limit in ids.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name}: expected 0 to {end - 1}, got {low if low < 0 else high}")


def _check_staging(kv_caches: KVCaches, block_ids: Tensor, staging: Tensor, rows: Tensor | None) -> None:
    for name, ids in (("block_ids", block_ids), ("rows", block_ids if rows is None else rows)):
        if ids.ndim != 1 or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError(f"{name}: expected contiguous int64 [n], got {ids.dtype} {list(ids.shape)}")
    if rows is not None and rows.shape != block_ids.shape:
        raise ValueError(f"rows: expected {list(block_ids.shape)} like block_ids, got {list(rows.shape)}")
    cache = _first_cache(kv_caches)
    num_rows = block_ids.numel() if rows is None else staging.shape[0]
    expected = (num_rows, len(kv_caches), 2, *cache.shape[1:])
    if staging.shape != expected or staging.dtype != cache.dtype or staging.device != cache.device:
        raise ValueError(
            f"staging: expected {list(expected)} {cache.dtype} on {cache.device}, got {list(staging.shape)} "
            f"{staging.dtype} on {staging.device}"
        )
    if staging.numel() and not staging[0, 0].is_contiguous():
        raise ValueError(f"staging: expected each block of a layer in one piece, got strides {list(staging.stride())}")


def _first_cache(kv_caches: KVCaches) -> Tensor:
    if not kv_caches:
        raise ValueError("kv_caches: expected at least one layer, got none")
    return kv_caches[0][0]


def check_caches(kv_caches: KVCaches) -> Tensor:
    """The first cache, if all are contiguous and alike. Raises ValueError otherwise."""
    first = _first_cache(kv_caches)
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


def check_pairs(src_name: str, src: Tensor, dst_name: str, dst: Tensor) -> None:
    """Raises ValueError, naming the argument, unless both are contiguous int64 of one length on one device."""
    for name, x in ((src_name, src), (dst_name, dst)):
        if x.ndim != 1 or x.dtype != torch.int64 or not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous int64 [n], got {x.dtype} {list(x.shape)}")
    if src.shape != dst.shape or src.device != dst.device:
        raise ValueError(
            f"{dst_name}: expected {list(src.shape)} on {src.device} like {src_name}, got {list(dst.shape)} on "
            f"{dst.device}"
        )
