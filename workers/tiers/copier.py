"""Copies between the blocks of a device and slots of host memory."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.kv.block_copy import CacheAddresses, gather_blocks, scatter_blocks
from workers.engine.kv_cache import KVCaches
from workers.tiers.host_slots import HostSlots
from workers.tiers.rounding import Rounding
from workers.upload import upload

STAGING_BYTES = 64 << 20  # of device memory: long enough pieces for the bus, and little compared with a KV cache

Mark = torch.cuda.Event | None  # a point in the work that a device has been given; None: all of it is done


class Copier(Protocol):
    """`store` and `load` block until the copy is complete, and are called by one thread."""

    def mark(self) -> Mark:
        """The end of all rounds so far. For the thread that runs rounds; does not wait."""

    def store(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        """Copy each block to its slot, once the device has come to the mark."""

    def load(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        """Copy each slot to its block, once the device has come to the mark."""


def make_copier(
    kv_caches: KVCaches, addresses: CacheAddresses, host: HostSlots, device: torch.device, rounding: Rounding | None
) -> Copier:
    """`rounding`: how blocks become the rows of host memory; None: they are the rows."""
    if device.type == "cuda":
        return CudaCopier(kv_caches, addresses, host, rounding)
    if rounding is not None:
        return RoundingCpuCopier(kv_caches, addresses, host, rounding)
    return CpuCopier(kv_caches, addresses, host)


class CpuCopier:
    """One copy from memory to memory, on the calling thread alone. A round is done when its call returns."""

    def __init__(self, kv_caches: KVCaches, addresses: CacheAddresses, host: HostSlots) -> None:
        self._kv_caches = kv_caches
        self._addresses = addresses
        self._memory = host.memory

    def mark(self) -> Mark:
        return None

    def store(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        blocks, rows = (torch.tensor(ids, dtype=torch.int64) for ids in (block_ids, host_slots))
        gather_blocks(self._kv_caches, blocks, self._memory, rows=rows, addresses=self._addresses)

    def load(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        blocks, rows = (torch.tensor(ids, dtype=torch.int64) for ids in (block_ids, host_slots))
        scatter_blocks(self._kv_caches, blocks, self._memory, rows=rows, addresses=self._addresses)


class RoundingCpuCopier:
    """One block at a time, which the processor's caches hold between its gather and its rounding."""

    def __init__(self, kv_caches: KVCaches, addresses: CacheAddresses, host: HostSlots, rounding: Rounding) -> None:
        self._kv_caches = kv_caches
        self._addresses = addresses
        self._memory = host.memory
        self._rounding = rounding
        self._block = torch.empty((1, *rounding.block_shape), dtype=kv_caches[0][0].dtype)

    def mark(self) -> Mark:
        return None

    def store(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        for block_id, slot in zip(block_ids, host_slots, strict=True):
            gather_blocks(self._kv_caches, torch.tensor([block_id]), self._block, addresses=self._addresses)
            self._rounding.pack(self._block, self._memory[slot : slot + 1])

    def load(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        for block_id, slot in zip(block_ids, host_slots, strict=True):
            self._rounding.unpack(self._memory[slot : slot + 1], self._block)
            scatter_blocks(self._kv_caches, torch.tensor([block_id]), self._block, addresses=self._addresses)


class CudaCopier:
    """On a stream of its own, through a staging buffer on the device: one launch gathers or scatters the pieces of all
    layers, and the bus carries whole blocks. Blocks are rounded on the device, so that the bus carries fewer bytes."""

    def __init__(
        self, kv_caches: KVCaches, addresses: CacheAddresses, host: HostSlots, rounding: Rounding | None
    ) -> None:
        self._kv_caches = kv_caches
        self._addresses = addresses
        self._memory = host.memory
        self._rounding = rounding
        cache = kv_caches[0][0]
        self._device = cache.device
        num_rows = min(len(host.memory), max(1, STAGING_BYTES // host.block_bytes))
        self._staging = torch.empty((num_rows, *host.memory.shape[1:]), dtype=host.memory.dtype, device=self._device)
        if rounding is not None:
            self._blocks = torch.empty((num_rows, *rounding.block_shape), dtype=cache.dtype, device=self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has it without types
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the buffer's memory may still be in use

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has it without types
        event.record(torch.cuda.current_stream(self._device))
        return event

    def store(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        with torch.cuda.stream(self._stream):
            self._wait_for(after)
            for part in self._parts(block_ids):
                staged = self._staging[: len(block_ids[part])]
                blocks = upload(block_ids[part], torch.int64, self._device)
                self._gather(blocks, staged)
                for rows, slots in _runs(host_slots[part]):
                    self._memory[slots].copy_(staged[rows], non_blocking=True)
            self._complete()

    def load(self, block_ids: Sequence[int], host_slots: Sequence[int], after: Mark) -> None:
        with torch.cuda.stream(self._stream):
            self._wait_for(after)
            for part in self._parts(block_ids):
                staged = self._staging[: len(block_ids[part])]
                for rows, slots in _runs(host_slots[part]):
                    staged[rows].copy_(self._memory[slots], non_blocking=True)
                blocks = upload(block_ids[part], torch.int64, self._device)
                self._scatter(blocks, staged)
            self._complete()

    def _gather(self, blocks: Tensor, staged: Tensor) -> None:
        exact = staged if self._rounding is None else self._blocks[: len(staged)]
        gather_blocks(self._kv_caches, blocks, exact, addresses=self._addresses)
        if self._rounding is not None:
            self._rounding.pack(exact, staged)

    def _scatter(self, blocks: Tensor, staged: Tensor) -> None:
        exact = staged if self._rounding is None else self._blocks[: len(staged)]
        if self._rounding is not None:
            self._rounding.unpack(staged, exact)
        scatter_blocks(self._kv_caches, blocks, exact, addresses=self._addresses)

    def _wait_for(self, mark: Mark) -> None:
        assert mark is not None, "from self.mark"
        self._stream.wait_event(mark)

    def _complete(self) -> None:
        """Wait until the stream has done all of it. A round that is launched after that, by any thread and on any
        stream, finds the copy complete, so no other stream has to wait for an event."""
        # The thread sleeps meanwhile: the cores are for those who launch rounds.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has it without types
        done.record(self._stream)
        done.synchronize()

    def _parts(self, block_ids: Sequence[int]) -> Iterator[slice]:
        """As many blocks at a time as the staging buffer has rows. Parts are in order of the stream, so the buffer is
        free again when the next one needs it."""
        num_rows = len(self._staging)
        return (slice(start, start + num_rows) for start in range(0, len(block_ids), num_rows))


def _runs(slots: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Rows of consecutive slots, and these slots: each run is one copy."""
    start = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[row - 1] + 1:
            yield slice(start, row), slice(slots[start], slots[start] + row - start)
            start = row
