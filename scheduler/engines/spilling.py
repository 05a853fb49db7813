"""Seqs that have more blocks than the device: older ones stay in host memory, where attention reads them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from childproc.block_digests import Digest
from scheduler.engines.slot import Slot
from scheduler.kv_cache.blocks import BlockManager
from scheduler.kv_cache.contents import CacheContents
from scheduler.kv_cache.host import HostBlock, HostTier
from scheduler.kv_cache.tiers import Tiers
from scheduler.requests.request import Seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How much of such a seq is where."""

    device_share: int = 4  # its newest blocks stay on the device, up to the pool divided by this; not measured
    host_share: int = 2  # such seqs fill host memory up to its slots divided by this if a disk needs the others


_TUNING = Tuning()


class Spilling:
    """A block leaves the device once it is complete and stored. From then on its host slot is pinned for the seq, and
    its device block is one like any other that can be found again. A seq starts only when host memory has room for all
    that it may become, beside the other seqs of this kind. So each of them ends, however little the device holds."""

    def __init__(self, blocks: BlockManager, tiers: Tiers | None, tuning: Tuning = _TUNING) -> None:
        """`tiers`: None if all seqs stay on the device."""
        self._blocks = blocks
        self._tiers = tiers
        self._host = HostTier(0, CacheContents()) if tiers is None else tiers.host
        self._num_slots = self._host.num_slots // (tuning.host_share if tiers and tiers.disk.num_blocks else 1)
        self._num_kept = max(1, blocks.num_blocks // tuning.device_share)  # blocks of a seq on the device
        self._seqs: dict[Slot, Seq] = {}
        self._leaving: deque[tuple[int, list[HostBlock]]] = deque()  # that rounds up to this number may still read

    @property
    def longest_seq(self) -> int:
        """Tokens of a seq that host memory has room for."""
        return self._num_slots * self._blocks.block_size

    def takes(self, seq: Seq) -> bool:
        """Whether the seq is one of this kind."""
        return seq.request.is_budgeted and seq.max_len > self._blocks.num_blocks * self._blocks.block_size

    def has_room_for(self, seq: Seq) -> bool:
        """Whether the seq may start beside those that run."""
        if not self.takes(seq):
            return True
        num_blocks = map(self._blocks.num_blocks_for, (other.max_len for other in (seq, *self._seqs.values())))
        return sum(num_blocks) <= self._num_slots

    def first_chunk(self, seq: Seq, num_tokens: int) -> int:
        """For how many of the tokens of its first chunk a seq needs room before it starts."""
        return min(num_tokens, self._num_kept * self._blocks.block_size) if self.takes(seq) else num_tokens

    def find_for(self, seq: Seq, digests: Sequence[Digest]) -> list[HostBlock]:
        """The blocks of the longest prefix in host memory, if the seq may leave them there."""
        return self._find(digests) if self.takes(seq) else []

    def _find(self, digests: Sequence[Digest]) -> list[HostBlock]:
        ready = map(self._host.ready, digests)
        return [block for block in takewhile(lambda block: block is not None, ready) if block is not None]

    def begin(self, seq: Seq, slot: Slot) -> None:
        """The seq runs in this slot, whose leading blocks `find_for` has found."""
        if not self.takes(seq):
            return
        self._seqs[slot] = seq
        for block in slot.in_host:
            self._host.pin(block)
        self._host.use([block.digest for block in slot.in_host])

    def release(self, slot: Slot, last_round: int) -> None:
        """The seq has left the slot. Rounds in flight, up to `last_round`, may still read its host slots, and a read
        from disk does not wait for them."""
        if self._seqs.pop(slot, None) is not None and slot.in_host:
            self._leaving.append((last_round, slot.in_host))

    def completed(self, round_id: int) -> None:
        """All rounds up to this one are over."""
        while self._leaving and self._leaving[0][0] <= round_id:
            for block in self._leaving.popleft()[1]:
                self._host.unpin(block)

    @property
    def num_to_come(self) -> int:
        """Device blocks that seqs give up as soon as copies are in host memory."""
        return sum(map(self._num_surplus, self._seqs))

    def move(self) -> None:
        """Let go of device blocks that are in host memory too."""
        for slot, seq in self._seqs.items():
            if num_surplus := self._num_surplus(slot):
                start = slot.num_in_host
                digests = seq.digests.extend(seq.token_ids, slot.num_published)
                self._move(slot, digests[start : start + num_surplus])

    def _num_surplus(self, slot: Slot) -> int:
        """Full blocks on the device beyond those that may stay."""
        return max(0, slot.num_published - slot.num_in_host - self._num_kept)

    def _move(self, slot: Slot, digests: Sequence[Digest]) -> None:
        stored = self._find(digests)
        start, end = slot.num_in_host, slot.num_in_host + len(stored)
        for block in stored:
            self._host.pin(block)
        left = slot.block_ids[start:end]
        slot.block_ids[start:end] = [block.slot for block in stored]
        slot.in_host += stored
        self._blocks.release(left)
        if self._tiers is not None and self._tiers.has_stored:
            self._store_again(self._tiers, slot.block_ids[end : start + len(digests)], digests[len(stored) :])

    def _store_again(self, tiers: Tiers, block_ids: Sequence[int], digests: Sequence[Digest]) -> None:
        """Host memory had no room for these, or has evicted them since."""
        for block_id, digest in zip(block_ids, digests, strict=True):
            self._blocks.publish(block_id, digest)
            (known_id,) = self._blocks.match([digest])
            tiers.store(known_id, digest)
