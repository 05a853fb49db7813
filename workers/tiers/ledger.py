"""Which block is where, which slots are free, and what may be evicted: everything of the disk tier that is not I/O."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workers.tiers.segment_file import SegmentFile

_SLOT_BITS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Since the store was opened, but for the first two."""

    num_blocks: int
    bytes_on_disk: int  # of segment files, whatever they hold
    num_checksum_failures: int
    num_read_errors: int
    num_evicted: int  # blocks that made room for others
    num_rewritten: int  # blocks that stayed although their segment went, because they had been read


class Segment:
    """A segment file and what the ledger notes about it. Only the ledger changes the notes."""

    def __init__(self, number: int, file: SegmentFile) -> None:
        self.number = number
        self.file = file
        self.num_bytes = file.num_bytes
        self.is_sealed = file.is_sealed
        self.is_leaving = False
        self.is_unlinked = False
        self.num_live = 0
        self.num_taken = 0
        self.num_writers = 0
        self.num_readers = 0
        self.was_read = bytearray(file.shape.num_blocks)  # since it was written

    @property
    def is_full(self) -> bool:
        return self.num_taken == self.file.shape.num_blocks

    @property
    def wants_seal(self) -> bool:
        return self.is_full and not self.num_writers and not self.is_sealed


@dataclass(frozen=True, slots=True)
class Place:
    segment: Segment
    slot: int

    def is_followed_by(self, other: "Place") -> bool:
        """Without a gap."""
        shape = self.segment.file.shape
        return self.segment is other.segment and shape.block_offset(other.slot) - shape.block_offset(self.slot) == (
            shape.block_bytes
        )


def runs(places: Sequence[Place | None]) -> Iterator[slice]:
    """Runs of places that are adjacent on disk."""
    start = 0
    for end in range(1, len(places) + 1):
        before, after = places[end - 1], places[end] if end < len(places) else None
        if before is None or after is None or not before.is_followed_by(after):
            if before is not None:
                yield slice(start, end)
            start = end


class Ledger:
    """Thread-safe. No call waits for anything but other calls. The index takes about 200 bytes for each block, in
    values that the garbage collector need not visit."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}  # by number, oldest first
        self._filling: list[Segment] = []  # those that are not sealed
        self._next_number = 0
        self._places: dict[bytes, int] = {}  # number of the segment and slot, least recently written first
        self._being_written: set[bytes] = set()
        self._evicted: list[bytes] = []  # not yet reported
        self._read_error = ""  # not yet reported
        self._num_damaged = 0  # not yet reported
        self._num_bytes = 0
        self._num_leaving_bytes = 0
        self._counts = dict.fromkeys(("checksum_failures", "read_errors", "evicted", "rewritten"), 0)

    # Blocks

    def digests(self) -> list[bytes]:
        with self._lock:
            return list(self._places)

    def begin_write(self, digest: bytes) -> bool:
        """False: it is there, or another thread is writing it."""
        with self._lock:
            if digest in self._places or digest in self._being_written:
                return False
            self._being_written.add(digest)
            return True

    def end_write(self, digest: bytes) -> None:
        with self._lock:
            self._being_written.discard(digest)

    def begin_read(self, digest: bytes) -> Place | None:
        """Where it is; `end_read` must follow, and its segment's bytes count until then."""
        with self._lock:
            number = self._places.get(digest)
            if number is None:
                return None
            place = self._place(number)
            place.segment.num_readers += 1
            return place

    def end_read(self, place: Place, *, is_good: bool) -> None:
        with self._lock:
            place.segment.num_readers -= 1
            if is_good:
                place.segment.was_read[place.slot] = True
            self._free_bytes(place.segment)

    def publish(self, digest: bytes, place: Place, *, instead_of: Place | None = None) -> bool:
        """Lookups find the block at `place` from now on. False: it was dropped in the meantime."""
        with self._lock:
            if instead_of is not None:
                if self._places.get(digest) != self._number(instead_of):
                    return False
                self._counts["rewritten"] += 1
            self._remove(digest)
            self._places[digest] = self._number(place)
            place.segment.num_live += 1
            return True

    def forget(self, digest: bytes, place: Place | None = None) -> Place | None:
        """Where it was. With `place`: forget it only if it is there."""
        with self._lock:
            if place is not None and self._places.get(digest) != self._number(place):
                return None
            return self._remove(digest)

    def note_read_error(self, text: str) -> None:
        with self._lock:
            self._counts["read_errors"] += 1
            self._read_error = text

    def note_damage(self) -> None:
        with self._lock:
            self._counts["checksum_failures"] += 1
            self._num_damaged += 1

    def take_read_trouble(self) -> tuple[str, int]:
        """The last error, empty if there was none, and the number of damaged blocks, since this was called before."""
        with self._lock:
            trouble = self._read_error, self._num_damaged
            self._read_error, self._num_damaged = "", 0
            return trouble

    def take_evicted(self) -> list[bytes]:
        """Digests that are gone and were not reported yet."""
        with self._lock:
            evicted, self._evicted = self._evicted, []
            return [digest for digest in evicted if digest not in self._places]

    def count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def stats(self) -> StoreStats:
        with self._lock:
            counts = {f"num_{what}": count for what, count in self._counts.items()}
            return StoreStats(num_blocks=len(self._places), bytes_on_disk=self._num_bytes, **counts)

    # Segments

    def take_slot(self) -> Place | None:
        """A free slot of an unsealed segment, for the caller to fill; `release_slot` must follow."""
        with self._lock:
            for segment in self._filling:
                if not segment.is_full:
                    segment.num_taken += 1
                    segment.num_writers += 1
                    return Place(segment, segment.num_taken - 1)
            return None

    def release_slot(self, place: Place) -> bool:
        """Whether the caller must seal the segment now: it is full, and nobody else writes to it."""
        with self._lock:
            place.segment.num_writers -= 1
            return place.segment.wants_seal

    def reserve_bytes(self, num_bytes: int) -> bool:
        """For a new segment. False: something must be unlinked first."""
        with self._lock:
            if self._num_bytes > self.max_bytes:
                return False
            self._num_bytes += num_bytes
            return True

    def unreserve_bytes(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes -= num_bytes

    def add(self, file: SegmentFile, blocks: Sequence[tuple[int, bytes]] = (), *, num_reserved_bytes: int = 0) -> None:
        """A segment that is newer than all others, with slots and digests of what it holds."""
        with self._lock:
            segment = Segment(self._next_number, file)
            self._next_number += 1
            self._segments[segment.number] = segment
            self._num_bytes += segment.num_bytes - num_reserved_bytes
            if not segment.is_sealed:
                self._filling.append(segment)
            for slot, digest in blocks:
                self._remove(digest)
                self._places[digest] = segment.number << _SLOT_BITS | slot
            segment.num_live = len(blocks)

    def segments(self) -> list[Segment]:
        """Oldest first."""
        with self._lock:
            return list(self._segments.values())

    def filling(self) -> list[Segment]:
        with self._lock:
            return list(self._filling)

    def sealed(self, segment: Segment) -> None:
        with self._lock:
            self._num_bytes += segment.file.num_bytes - segment.num_bytes
            segment.num_bytes = segment.file.num_bytes
            segment.is_sealed = True
            self._filling.remove(segment)

    def claim_victim(self, *, is_urgent: bool) -> Segment | None:
        """The sealed segment that goes next; the caller must `detach` and unlink it. None: no need, or none is left.
        Urgent: even if those that are on their way out would suffice."""
        with self._lock:
            if not is_urgent and self._num_bytes - self._num_leaving_bytes <= self.max_bytes:
                return None
            candidates = [s for s in self._segments.values() if s.is_sealed and not s.is_leaving]
            if not candidates:
                return None
            victim = min(candidates, key=lambda segment: segment.num_live > 0)  # an empty one, or else the oldest
            self._leave(victim)
            return victim

    def blocks_in_use(self, victim: Segment) -> list[tuple[bytes, Place]]:
        """Blocks that were read since they were written."""
        with self._lock:
            return [(digest, place) for digest, place in self._blocks_of(victim) if victim.was_read[place.slot]]

    def detach(self, segment: Segment) -> None:
        """Forget whatever it still holds."""
        with self._lock:
            self._leave(segment)
            self._segments.pop(segment.number, None)
            if segment in self._filling:
                self._filling.remove(segment)
            gone = [digest for digest, _ in self._blocks_of(segment)]
            for digest in gone:
                del self._places[digest]
            self._evicted += gone
            self._counts["evicted"] += len(gone)

    def unlinked(self, segment: Segment) -> None:
        with self._lock:
            segment.is_unlinked = True
            self._free_bytes(segment)

    # With the lock held

    def _number(self, place: Place) -> int:
        return place.segment.number << _SLOT_BITS | place.slot

    def _place(self, number: int) -> Place:
        return Place(self._segments[number >> _SLOT_BITS], number & ((1 << _SLOT_BITS) - 1))

    def _remove(self, digest: bytes) -> Place | None:
        number = self._places.pop(digest, None)
        if number is None:
            return None
        place = self._place(number)
        place.segment.num_live -= 1
        return place

    def _blocks_of(self, segment: Segment) -> list[tuple[bytes, Place]]:
        found = ((digest, Place(segment, slot)) for slot, digest in segment.file.blocks())
        return [(digest, place) for digest, place in found if self._places.get(digest) == self._number(place)]

    def _leave(self, segment: Segment) -> None:
        if not segment.is_leaving:
            segment.is_leaving = True
            self._num_leaving_bytes += segment.num_bytes

    def _free_bytes(self, segment: Segment) -> None:
        """The file system keeps the bytes of an unlinked file while somebody reads it."""
        if segment.is_unlinked and not segment.num_readers:
            self._num_bytes -= segment.num_bytes
            self._num_leaving_bytes -= segment.num_bytes
            segment.num_bytes = 0
