"""KV blocks in fewer bits, for the tiers below the device (kv_cache.tier_dtype)."""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kernels.kv.kv_quant import QuantisedBlocks, dequantise_blocks, quantise_blocks
from workers.engine.kv_cache import KVLayout


class Rounding:
    """Packs blocks into rows of bytes: scales, then the plane of the upper four bits, then that of the lower four
    (kernels/kv/kv_quant.py). So the first bytes of a row are a block of four bits."""

    def __init__(self, layout: KVLayout) -> None:
        self.block_shape = (layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        num_layers, _, block_size, num_kv_heads, head_dim = self.block_shape
        plane = (num_layers, 2, block_size, num_kv_heads, head_dim // 2)
        self._fields = (
            ((num_layers, 2, num_kv_heads, head_dim), torch.float32),
            ((num_layers, 2, block_size, num_kv_heads), torch.float32),
            (plane, torch.uint8),
            (plane, torch.uint8),
        )

    def pack(self, blocks: Tensor, rows: Tensor) -> None:
        """blocks: [n, *block_shape], contiguous. rows: uint8 [n, TierBlock.host_bytes] on the same device."""
        rounded = quantise_blocks(blocks)
        assert rounded.lower is not None, "both planes were made"
        fields = (rounded.k_scales, rounded.v_scales, rounded.upper, rounded.lower)
        for field, part in zip(fields, self._parts(), strict=True):
            rows[:, part] = field.view(torch.uint8).view(len(rows), -1)

    def unpack(self, rows: Tensor, blocks: Tensor) -> None:
        """The inverse, as far as rounding allows."""
        k_scales, v_scales, upper, lower = (
            rows[:, part].clone().view(dtype).view(len(rows), *shape)  # a row may begin anywhere, numbers may not
            for part, (shape, dtype) in zip(self._parts(), self._fields, strict=True)
        )
        dequantise_blocks(QuantisedBlocks(upper=upper, lower=lower, k_scales=k_scales, v_scales=v_scales), blocks)

    def _parts(self) -> Iterator[slice]:
        """Of a row."""
        sizes = (torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._fields)
        return (slice(start, end) for start, end in pairwise(accumulate(sizes, initial=0)))
