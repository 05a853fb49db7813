"""Host memory for KV blocks: one slot holds one block of all layers, in one piece."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from childproc.tier_block import TierBlock
from workers.engine.kv_cache import KVCacheError, KVLayout

_TOUCHED_BYTES = 256 << 20  # between two reports of progress
_MIDDLE = 0x87  # two lower halves, of 7.5 on average, for blocks of which only the upper bits are known


class HostSlots:
    """As many slots as were asked for; their memory is taken when they are made."""

    def __init__(self, memory: Tensor, disk_block_bytes: int) -> None:
        """memory: contiguous [num_slots, num_layers, 2, block_size, num_kv_heads, head_dim], as gather_blocks stages
        blocks; or uint8 [num_slots, TierBlock.host_bytes], if they are rounded. disk_block_bytes: the first ones of a
        slot, which are all that the disk gets."""
        self.memory = memory
        self.disk_block_bytes = disk_block_bytes
        self._bytes = memory.view(torch.uint8).view(memory.shape[0], -1).numpy()  # the same memory

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        layout: KVLayout,
        device: torch.device,
        on_progress: Callable[[int, int], None],
        rounded: TierBlock | None = None,
    ) -> "HostSlots":
        """Every page is written once, so that the process has its memory from the start and never runs out of it in the
        middle of a move. For a GPU the memory is pinned.

        Args:
            on_progress: is told the bytes written so far, and all bytes.
            rounded: what a rounded block takes; None: blocks are as on the device.

        Raises:
            KVCacheError: There is not so much memory.
        """
        shape: tuple[int, ...] = (layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        dtype, block = layout.dtype, TierBlock(host_bytes=layout.block_bytes, disk_bytes=layout.block_bytes)
        if rounded is not None:
            shape, dtype, block = (rounded.host_bytes,), torch.uint8, rounded
        try:
            memory = torch.empty((num_slots, *shape), dtype=dtype)
        except RuntimeError as err:
            raise KVCacheError(
                f"KV cache: no host memory for {num_slots} blocks of {block.host_bytes:,} bytes: "
                "lower kv_cache.cpu_bytes"
            ) from err
        _touch(memory, block.host_bytes, on_progress)
        if device.type == "cuda":
            _pin(memory)
        return cls(memory, block.disk_bytes)

    @property
    def block_bytes(self) -> int:
        return int(self._bytes.shape[1])

    def fill(self, slot: int, block: memoryview) -> None:
        """Copy what the disk has of a block into a slot, without the interpreter's lock."""
        np.copyto(self._bytes[slot, : self.disk_block_bytes], np.frombuffer(block, np.uint8))
        self._bytes[slot, self.disk_block_bytes :] = _MIDDLE

    def copy_to(self, block: memoryview, slot: int) -> None:
        """Copy what the disk gets of a slot into the bytes of a block, without the interpreter's lock."""
        np.copyto(np.frombuffer(block, np.uint8), self._bytes[slot, : self.disk_block_bytes])


def _touch(memory: Tensor, block_bytes: int, on_progress: Callable[[int, int], None]) -> None:
    step = max(1, _TOUCHED_BYTES // block_bytes)
    for start in range(0, len(memory), step):
        memory[start : start + step].zero_()
        on_progress(min(start + step, len(memory)) * block_bytes, len(memory) * block_bytes)


def _pin(memory: Tensor) -> None:
    """Registers the memory with CUDA. torch's own pinned memory comes in powers of two: up to twice what was asked."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has it without types
    torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
