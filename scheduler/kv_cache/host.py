"""Which block of KV is in which slot of host memory."""

from collections import OrderedDict
from collections.abc import Sequence, ValuesView
from dataclasses import dataclass

from childproc.block_digests import Digest
from scheduler.kv_cache.contents import CacheContents


@dataclass(slots=True, eq=False)
class HostBlock:
    """A slot and what it holds, or will hold once it is filled."""

    slot: int
    digest: Digest
    is_ready: bool = False
    is_known: bool = True  # False: its contents are not to be trusted, and the slot is free when nothing uses it
    is_being_written: bool = False  # to disk
    num_pins: int = 0  # moves that fill or read the slot
    num_uses: int = 0  # seqs that found it, here or on the device


class HostTier:
    """Slots of host memory. A new block replaces the least recently used one that no move needs.

    The blocks of a prefix are used from its end to its start. So the start, without which the rest is worthless, stays
    longest.
    """

    def __init__(self, num_slots: int, contents: CacheContents) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._contents = contents
        self._free = list(reversed(range(num_slots)))
        self._by_digest: OrderedDict[Digest, HostBlock] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def get(self, digest: Digest) -> HostBlock | None:
        return self._by_digest.get(digest)

    def ready(self, digest: Digest) -> HostBlock | None:
        """The block, if its slot is filled."""
        block = self._by_digest.get(digest)
        return block if block is not None and block.is_ready else None

    def reserve(self, digest: Digest) -> HostBlock | None:
        """A pinned slot to be filled with a block that is not here yet; None if every slot is needed."""
        assert digest not in self._by_digest, "a block has one slot"
        if not self._free and not self._evict():
            return None
        block = HostBlock(self._free.pop(), digest, num_pins=1)
        self._by_digest[digest] = block
        return block

    def filled(self, block: HostBlock, *, is_right: bool) -> None:
        """The move that fills the slot has ended."""
        block.is_ready = is_right
        if is_right and block.is_known:
            self._contents.add(block.digest)
        elif not is_right:
            self._forget(block)
        self.unpin(block)

    def pin(self, block: HostBlock) -> None:
        block.num_pins += 1

    def unpin(self, block: HostBlock) -> None:
        block.num_pins -= 1
        assert block.num_pins >= 0, "a slot is unpinned as often as it was pinned"
        if not block.is_known and block.num_pins == 0:
            self._free.append(block.slot)

    def use(self, digests: Sequence[Digest]) -> list[HostBlock]:
        """A seq has found this prefix. Returns its blocks that are here."""
        used = [block for digest in reversed(digests) if (block := self._by_digest.get(digest)) is not None]
        for block in used:
            block.num_uses += 1
            self._by_digest.move_to_end(block.digest)
        return used

    def forget(self, digest: Digest) -> None:
        """Let nobody find the block again."""
        block = self._by_digest.get(digest)
        if block is not None:
            self._forget(block)
            if block.num_pins == 0:
                self._free.append(block.slot)

    def oldest(self) -> ValuesView[HostBlock]:
        """Least recently used first."""
        return self._by_digest.values()

    def evict(self, block: HostBlock) -> None:
        """Free the slot of a block that no move needs."""
        assert block.num_pins == 0, "a pinned slot cannot be freed"
        self._forget(block)
        self._free.append(block.slot)
        self.num_evictions += 1

    def _evict(self) -> bool:
        victim = next((block for block in self._by_digest.values() if block.num_pins == 0), None)
        if victim is None:
            return False
        self.evict(victim)
        return True

    def _forget(self, block: HostBlock) -> None:
        if block.is_known:
            block.is_known = False
            del self._by_digest[block.digest]
            if block.is_ready:
                self._contents.remove(block.digest)
