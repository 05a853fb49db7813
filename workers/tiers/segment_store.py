"""KV blocks on disk, found by their digests, for one rank of one engine.

Blocks are appended to segment files of about 64 MiB (`segments.py`). When `max_bytes` are full, the oldest segment
goes. Of its blocks, those that were read since they were last written are written again; at most half of a segment, so
that eviction gains room. A block can be read as soon as its `write` has returned, sealed or not.

What a crash loses: if the process is killed, only blocks whose `write` had not returned. If the machine loses power,
also blocks of segments that were not yet full; sealed ones are durable. The next owner reads what was left unsealed,
keeps the blocks that agree with their checksums, cuts off the rest, and seals it. A sealed block that is damaged fails
its checksum when it is read, and is a miss.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

from childproc.segment_shape import DIGEST_BYTES, PAGE_BYTES, Shape, choose_shape
from workers.tiers.files import Files, aligned_buffer, is_aligned
from workers.tiers.folder import StoreError, check_layout, has_direct_io, make_private, take_ownership, write_layout
from workers.tiers.layout import layout_digest
from workers.tiers.ledger import Ledger, Place, Segment, StoreStats, runs
from workers.tiers.segment_file import SEALED, UNSEALED, SegmentFile, is_segment_name
from workers.tiers.segments import FORMAT_VERSION

logger = logging.getLogger(__name__)

_OPENING_PATIENCE_S = 0.25  # segments are made one after another, unless that takes longer; not measured


@dataclass(frozen=True, slots=True)
class Written:
    evicted: list[bytes]  # other digests that are no longer there, each reported once


class SegmentStore:
    """Thread-safe: any number of threads may write and read at once. None waits for the I/O of another, but for the
    making of a segment, and for that a quarter of a second at most."""

    def __init__(
        self, files: Files, folder: Path, shape: Shape, *, max_bytes: int, layout: str, owner_fd: int | None
    ) -> None:
        """Use `open`."""
        self._files = files
        self._folder = folder
        self._shape = shape
        self._layout = layout
        self._owner_fd = owner_fd
        self._direct = False
        self._max_bytes = max_bytes
        self._ledger = Ledger(max_bytes)
        self._making = threading.Lock()
        self._last_serial = 0
        self._is_closed = False

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        block_bytes: int,
        num_parts: int,
        max_bytes: int,
        layout: Mapping[str, str | int | bool],
        read_only: bool = False,
        files: Files | None = None,
    ) -> "SegmentStore":
        """Blocks of `block_bytes`, in `num_parts` equal parts (layers) with a checksum each. Segment files take up to
        `max_bytes` and, for moments, one segment more. `layout` is all that must be equal for the bytes to mean the
        same; it is written to `layout.json`.

        `read_only`: reads the sealed segments of another process; see `refresh`. Raises StoreError if the folder
        belongs to another process or holds blocks of another layout; TooFewBytesError; else OSError."""
        files = files or Files()
        shape = choose_shape(block_bytes, num_parts, max_bytes)
        facts = {**layout, "format": FORMAT_VERSION, "block_bytes": block_bytes, "num_parts": num_parts}
        owner_fd = None
        if not read_only:
            make_private(folder)
            owner_fd = take_ownership(files, folder)
        try:
            if not check_layout(files, folder, facts) and not read_only:
                write_layout(files, folder, facts)
            store = cls(files, folder, shape, max_bytes=max_bytes, layout=layout_digest(facts), owner_fd=owner_fd)
            store._take_in_files()
        except BaseException:
            if owner_fd is not None:
                files.close(owner_fd)
            raise
        return store

    @property
    def is_read_only(self) -> bool:
        return self._owner_fd is None

    @property
    def capacity(self) -> int:
        """Blocks that fit in `max_bytes`."""
        return self._shape.capacity(self._max_bytes)

    @property
    def stats(self) -> StoreStats:
        return self._ledger.stats()

    def digests(self) -> list[bytes]:
        """Least recently written first."""
        return self._ledger.digests()

    def write(self, digest: bytes, block: memoryview) -> Written:
        """Does nothing if the block is there already. `block` is from `aligned_buffer`. Raises OSError; then the block
        is not there."""
        self._check_call(digest, block)
        if self.is_read_only:
            raise StoreError(f"{self._folder} was opened read-only; only its owner writes")
        if self._ledger.begin_write(digest):
            try:
                self._fill(self._free_place(), digest, block)
            finally:
                self._ledger.end_write(digest)
        return Written(self._ledger.take_evicted())

    def read(self, digest: bytes, into: memoryview) -> bool:
        """False: it is not there, or it was bad and is not there any more. `into` is from `aligned_buffer`; it holds
        anything after a miss."""
        return self.read_many([digest], [into])[0]

    def read_many(self, digests: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """As `read`, for up to some hundred blocks. Those that were written one after another are read in one go, which
        is faster, most of all 8 MiB at a time into `aligned_buffers`."""
        for digest, buffer in zip(digests, into, strict=True):
            self._check_call(digest, buffer)
        places = [self._ledger.begin_read(digest) for digest in digests]
        are_good = [False] * len(places)
        try:
            for run in runs(places):
                are_good[run] = self._read_run([place for place in places[run] if place], into[run])
        finally:
            for digest, place, is_good in zip(digests, places, are_good, strict=True):
                self._end_read(digest, place, is_good)
        return are_good

    def take_read_trouble(self) -> tuple[str, int]:
        """What the disk said when it could not read a block, empty if it could, and the number of blocks that it read
        and that were damaged. Each is reported once."""
        return self._ledger.take_read_trouble()

    def drop(self, digests: Iterable[bytes]) -> None:
        """Forget them. Their bytes stay until their segment goes."""
        self._erase([place for digest in digests if (place := self._ledger.forget(digest))])

    def close(self) -> None:
        """Seal what was written. Call it when no other call runs. If one hangs, the folder stays locked until the
        process ends."""
        if self._is_closed:
            return
        self._is_closed = True
        filling = self._ledger.filling()
        for segment in filling:
            if not segment.num_writers:
                with contextlib.suppress(OSError):
                    self._seal(segment)
        if self._owner_fd is not None and not any(segment.num_writers for segment in filling):
            self._files.close(self._owner_fd)

    def _check_call(self, digest: bytes, block: memoryview) -> None:
        if self._is_closed:
            raise StoreError(f"{self._folder} was closed; open it again")
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
        if block.nbytes != self._shape.block_bytes or block.format != "B":
            raise ValueError(f"a block is {self._shape.block_bytes} bytes, not {block.nbytes} of format {block.format}")
        if not is_aligned(block):
            raise ValueError("the buffer is not aligned to pages; take it from aligned_buffer")

    # Writing

    def _fill(self, place: Place, digest: bytes, block: memoryview, *, instead_of: Place | None = None) -> None:
        """Write a block to a slot that was taken for it, and let it be found. Seals a segment that is full then."""
        is_found = True
        try:
            place.segment.file.write(place.slot, digest, block)
            is_found = self._ledger.publish(digest, place, instead_of=instead_of)
        finally:
            if self._ledger.release_slot(place):
                self._seal(place.segment)
        if not is_found:
            self._erase([place])

    def _free_place(self) -> Place:
        while (place := self._ledger.take_slot()) is None:
            is_mine = self._making.acquire(timeout=_OPENING_PATIENCE_S)
            try:
                place = self._ledger.take_slot()
                if place is not None:
                    return place
                self._add_segment()
            finally:
                if is_mine:
                    self._making.release()
        return place

    def _add_segment(self) -> None:
        num_bytes = self._shape.file_bytes
        while not self._ledger.reserve_bytes(num_bytes):
            victim = self._ledger.claim_victim(is_urgent=True)
            if victim is None:
                raise OSError(ENOSPC, f"{self._folder}: every segment is being written or read, or cannot be removed")
            self._evict(victim)
        try:
            file = SegmentFile.create(
                self._files, self._folder, self._next_serial(), self._shape, layout=self._layout, direct=self._direct
            )
        except BaseException:
            self._ledger.unreserve_bytes(num_bytes)
            raise
        self._ledger.add(file, num_reserved_bytes=num_bytes)
        while victim := self._ledger.claim_victim(is_urgent=False):
            self._rewrite_blocks_in_use(victim)
            self._evict(victim)

    def _next_serial(self) -> int:
        """Ascending, and never one that a reader of this folder may know from an earlier time."""
        self._last_serial = max(self._last_serial + 1, time.time_ns())
        return self._last_serial

    def _seal(self, segment: Segment) -> None:
        """Raises OSError; then its blocks are lost."""
        if not segment.num_live:
            return self._evict(segment)
        try:
            segment.file.seal(segment.num_taken)
        except OSError:
            self._evict(segment)
            raise
        return self._ledger.sealed(segment)

    def _rewrite_blocks_in_use(self, victim: Segment) -> None:
        buffer = aligned_buffer(self._shape.block_bytes)
        for digest, place in self._ledger.blocks_in_use(victim)[: self._shape.num_blocks // 2]:
            if self._read_run([place], [buffer]) != [True]:
                continue
            free = self._ledger.take_slot()
            if free is None:
                return
            try:
                self._fill(free, digest, buffer, instead_of=place)
            except OSError as err:
                logger.warning("a block in use could not be written again in %s: %s", self._folder, err)
                return

    def _evict(self, segment: Segment) -> None:
        self._ledger.detach(segment)
        try:
            segment.file.stop_writing()
            segment.file.remove()
        except OSError as err:
            logger.warning("a segment of %s cannot be removed, so its bytes still count: %s", self._folder, err)
        else:
            self._ledger.unlinked(segment)

    # Reading

    def _read_run(self, run: Sequence[Place], into: Sequence[memoryview]) -> list[bool]:
        """Blocks that are adjacent on disk."""
        try:
            are_good = run[0].segment.file.read(run[0].slot, into)
        except FileNotFoundError:  # evicted in the meantime
            return [False] * len(run)
        except OSError as err:
            if len(run) > 1:  # some may be readable
                return [self._read_run([place], [buffer])[0] for place, buffer in zip(run, into, strict=True)]
            logger.warning("a block of %s cannot be read: %s", self._folder, err)
            self._ledger.note_read_error(str(err))
            return [False]
        for _ in range(are_good.count(False)):
            logger.warning("a block of %s is damaged", self._folder)
            self._ledger.note_damage()
        return are_good

    def _end_read(self, digest: bytes, place: Place | None, is_good: bool) -> None:
        if place is None:
            return
        self._ledger.end_read(place, is_good=is_good)
        if not is_good and self._ledger.forget(digest, place):
            self._erase([place])

    def _erase(self, places: list[Place]) -> None:
        if self.is_read_only:
            return
        by_segment: dict[Segment, list[int]] = {}
        for place in places:
            by_segment.setdefault(place.segment, []).append(place.slot)
        for segment, slots in by_segment.items():
            with contextlib.suppress(OSError):  # a restart then finds them again, as good or bad as they are
                segment.file.erase(slots)

    # Files that were there before

    def refresh(self) -> list[bytes]:
        """Read-only: take in what the owner has sealed since; returns the digests that are gone. Raises OSError."""
        names = set(self._segment_names())
        for segment in self._ledger.segments():
            if segment.file.name not in names:
                self._ledger.detach(segment)
                self._ledger.unlinked(segment)
        self._take_in_files()
        return self._ledger.take_evicted()

    def _segment_names(self) -> list[str]:
        """Oldest first."""
        try:
            names = self._files.listdir(self._folder)
        except FileNotFoundError:  # a reader came before the owner
            return []
        suffixes = (SEALED,) if self.is_read_only else (SEALED, UNSEALED)
        return sorted(name for name in names if is_segment_name(name) and name.endswith(suffixes))

    def _take_in_files(self) -> None:
        self._direct = self._shape.block_bytes % PAGE_BYTES == 0 and has_direct_io(self._files, self._folder)
        known = {segment.file.name for segment in self._ledger.segments()}
        for name in self._segment_names():
            if name not in known:
                self._last_serial = max(self._last_serial, int(name[:16], 16))
                self._take_in(self._folder / name)
        while not self.is_read_only and (victim := self._ledger.claim_victim(is_urgent=False)):
            self._evict(victim)

    def _take_in(self, path: Path) -> None:
        """An owner seals what was left unsealed, and removes what is useless. Raises OSError if it cannot."""
        blocks: list[tuple[int, bytes]] = []
        try:
            file = SegmentFile.load(self._files, path, like=self._shape, layout=self._layout, direct=self._direct)
            if file and not file.is_sealed:
                file.recover()
            blocks = list(file.blocks()) if file else []
        except OSError as err:
            logger.warning("%s cannot be used: %s", path, err)
            file = None
        if file and blocks:
            self._ledger.add(file, blocks)
        elif not self.is_read_only:
            self._files.unlink(path)
