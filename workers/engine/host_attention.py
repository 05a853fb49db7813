"""Attention of a seq that has more blocks than its device: the first of them are read from host memory.

A scratch on the device has room for all blocks of one seq, but of one layer. Before a layer is computed, its keys and
values are copied there: from host memory, and from the seq's last blocks, which are on the device. The new tokens' are
copied back after it. So the layers compute what they always do, with the same bits, and a long context takes memory of
the device for one layer instead of all.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from workers.engine.kv_cache import KVCaches, KVLayout
from workers.models.batch import Batch
from workers.models.decoder import CausalLM, KVCache, make_step


class _Places(NamedTuple):
    """Where the blocks of a seq are, and which of them change."""

    in_host: Tensor  # int64 [num_in_host], on the host: slots of the first blocks
    on_device: Tensor  # int64 [num_blocks - num_in_host]: of the others
    first_new: int  # the first block with a new token, counted from the seq's first one


def scratch_bytes(layout: KVLayout, *, max_model_len: int) -> int:
    """Device memory that a HostAttention takes."""
    return -(-max_model_len // layout.block_size) * layout.block_bytes // layout.num_layers


class HostAttention:
    """Forwards of the target. Called by the thread that runs rounds."""

    def __init__(
        self, model: CausalLM, kv_caches: KVCaches, memory: Tensor, layout: KVLayout, *, max_model_len: int
    ) -> None:
        """memory: of host slots with blocks as they are on the device: [num_slots, num_layers, 2, block_size,
        num_kv_heads, head_dim]."""
        self._model = model
        self._kv_caches = kv_caches
        self._memory = memory
        self._block_size = layout.block_size
        self._device = kv_caches[0][0].device
        num_blocks = -(-max_model_len // layout.block_size)
        ((keys, values),) = replace(layout, num_layers=1).allocate(num_blocks, self._device)
        self._scratch: KVCache = keys, values

    def forward(self, batch: Batch, num_in_host: int) -> Tensor:
        """As CausalLM.forward, for the new tokens of one seq. batch: on the host; the first `num_in_host` entries of
        its block table are slots of host memory."""
        blocks = batch.block_table[0].to(torch.int64)
        places = _Places(
            in_host=blocks[:num_in_host],
            on_device=blocks[num_in_host:].to(self._device),
            first_new=int(batch.positions[0]) // self._block_size,
        )
        in_scratch = replace(
            batch,
            slot_mapping=batch.positions,
            block_table=torch.arange(len(blocks), dtype=torch.int32).unsqueeze(0),
        ).to(self._device)
        with torch.inference_mode():
            step = make_step(in_scratch, self._model.cos_sin, self._scratch)
            return self._model.forward_by_layers(step, self._layers(places))

    def _layers(self, places: _Places) -> Iterator[KVCache]:
        """The scratch with one layer after another. Each is copied in when it is asked for, and its new blocks are
        copied back when the next one is."""
        num_in_host = len(places.in_host)
        num_blocks = num_in_host + len(places.on_device)
        new_blocks = places.on_device[places.first_new - num_in_host :]
        for layer, caches in enumerate(self._kv_caches):
            for part, (scratch, cache) in enumerate(zip(self._scratch, caches, strict=True)):
                self._copy_in(scratch[:num_in_host], layer, part, places.in_host)
                torch.index_select(cache, 0, places.on_device, out=scratch[num_in_host:num_blocks])
            yield self._scratch
            for scratch, cache in zip(self._scratch, caches, strict=True):
                cache.index_copy_(0, new_blocks, scratch[places.first_new : num_blocks])

    def _copy_in(self, scratch: Tensor, layer: int, part: int, slots: Tensor) -> None:
        """Keys (part 0) or values (1) of a layer, from slots of host memory."""
        stored = self._memory[:, layer, part]
        if self._device.type == "cpu":
            torch.index_select(stored, 0, slots, out=scratch)
        else:
            scratch.copy_(stored.index_select(0, slots))
