"""Copies of KV from slot to slot, in all layers at once: packs the accepted nodes of a tree of drafts."""

from itertools import chain

import triton
from torch import Tensor
from triton import language as tl

from kernels.dispatch import runs_triton
from kernels.kv.block_copy import CacheAddresses, KVCaches, cache_addresses, check_caches, check_pairs, words_at

MOVES_AT_ONCE = 16  # per MOVE_TILE_WORDS: what a program reads before it writes
MOVE_TILE_WORDS = 128


@triton.jit(do_not_specialize=["num_moves"], do_not_specialize_on_alignment=["src_ptr", "dst_ptr"])
def move_slots_kernel(table_ptr, src_ptr, dst_ptr, num_moves, slot_words, MOVES: tl.constexpr, TILE: tl.constexpr):
    """A program moves the same few words of every slot, so moves that touch the same slot meet in one program."""
    cache_ptr = words_at(table_ptr, tl.program_id(0))
    word = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = 0
    while start < num_moves:  # a for loop may be pipelined: loads sent ahead of the stores before them
        move = start + tl.arange(0, MOVES)
        src = tl.load(src_ptr + move, mask=move < num_moves, other=-1)
        dst = tl.load(dst_ptr + move, mask=move < num_moves, other=-1)
        moved = (src >= 0)[:, None] & (word < slot_words)[None, :]
        words = tl.load(cache_ptr + src[:, None] * slot_words + word[None, :], mask=moved)
        tl.debug_barrier()  # a slot may be read by one thread and written by another
        tl.store(cache_ptr + dst[:, None] * slot_words + word[None, :], words, mask=moved)
        tl.debug_barrier()
        start += MOVES


def move_slots(
    kv_caches: KVCaches, src_slots: Tensor, dst_slots: Tensor, *, addresses: CacheAddresses | None = None
) -> None:
    """Copy slot src_slots[i] over slot dst_slots[i] in all layers, in order of i: packs accepted tree nodes.

    src_slots, dst_slots: int64 [num_moves] on the device of the caches; slot = block_id * block_size + offset. A source
    of -1 means no move. A destination occurs once, and no later move reads it. Tree nodes that are numbered level by
    level always obey this, because each stays or moves towards the front. addresses: as for copy_blocks. Raises
    ValueError naming the argument that does not fit.
    """
    check_pairs("src_slots", src_slots, "dst_slots", dst_slots)
    if not runs_triton(src_slots):
        check_caches(kv_caches)
        move_slots_reference(kv_caches, src_slots, dst_slots)
        return
    addresses = addresses or cache_addresses(kv_caches)
    num_moves = src_slots.numel()
    if not num_moves:
        return
    tile = min(MOVE_TILE_WORDS, triton.next_power_of_2(addresses.slot_words))
    grid = (addresses.table.numel(), triton.cdiv(addresses.slot_words, tile))
    move_slots_kernel[grid](
        addresses.table,
        src_slots,
        dst_slots,
        num_moves,
        addresses.slot_words,
        MOVES=MOVES_AT_ONCE,
        TILE=tile,
    )


def move_slots_reference(kv_caches: KVCaches, src_slots: Tensor, dst_slots: Tensor) -> None:
    """The definition. Reads everything before it writes, which makes no difference to moves that obey the rule."""
    moved = (src_slots >= 0).nonzero().squeeze(1)
    src, dst = src_slots[moved], dst_slots[moved]
    for cache in chain.from_iterable(kv_caches):
        slots = cache.view(-1, *cache.shape[2:])
        slots.index_copy_(0, dst, slots.index_select(0, src))
