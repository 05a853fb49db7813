"""One segment on disk: how it is made, filled, sealed and read. Who may do what when is the store's business."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from childproc.segment_shape import PAGE_BYTES, Shape
from workers.tiers.files import Files, aligned_buffer, read_up_to, sync_folder, write_all
from workers.tiers.segments import agrees, digest_of, pack_entry, pack_header, parse_header

logger = logging.getLogger(__name__)

SEALED = ".seg"
UNSEALED = ".tmp"
_NAME = re.compile(r"[0-9a-f]{16}\.(seg|tmp)")


def is_segment_name(name: str) -> bool:
    """Whether a file is ours to read and to remove."""
    return _NAME.fullmatch(name) is not None


class SegmentFile:
    """Has its temporary name until it is sealed. Different slots may be written and read by several threads at once.
    Its entries stay in memory. All methods raise OSError."""

    def __init__(
        self,
        files: Files,
        folder: Path,
        serial: int,
        shape: Shape,
        *,
        entries: bytearray,
        num_bytes: int,
        direct: bool,
    ) -> None:
        self.serial = serial  # files made later have higher ones
        self.shape = shape
        self.num_bytes = num_bytes
        self._files = files
        self._folder = folder
        self._entries = entries
        self._direct = direct
        self._is_sealed = False
        self._block_fd = self._entry_fd = -1

    @classmethod
    def create(
        cls, files: Files, folder: Path, serial: int, shape: Shape, *, layout: str, direct: bool
    ) -> "SegmentFile":
        """Takes all the room that it will ever need. Leaves nothing behind if that fails."""
        entries = bytearray(shape.num_blocks * shape.entry_bytes)
        made = cls(files, folder, serial, shape, entries=entries, num_bytes=shape.file_bytes, direct=direct)
        made._entry_fd = files.open(made._path(UNSEALED), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            files.allocate(made._entry_fd, shape.file_bytes)
            write_all(files, made._entry_fd, memoryview(pack_header(shape, layout)), 0)
            made._block_fd = files.open(made._path(UNSEALED), os.O_WRONLY, direct=direct)
        except BaseException:
            made.stop_writing()
            with contextlib.suppress(OSError):
                made.remove()
            raise
        return made

    @classmethod
    def load(cls, files: Files, path: Path, *, like: Shape, layout: str, direct: bool) -> "SegmentFile | None":
        """What a file holds, by its header and entries. None: nothing, or it is not of this layout."""
        fd = files.open(path, os.O_RDONLY)
        try:
            page = memoryview(bytearray(PAGE_BYTES))
            read_up_to(files, fd, [page], 0)
            shape = parse_header(page, block_bytes=like.block_bytes, num_parts=like.num_parts, layout=layout)
            if shape is None:
                return None
            num_bytes = files.size(fd)
            entries = bytearray(shape.num_blocks_in(num_bytes) * shape.entry_bytes)
            read_up_to(files, fd, [memoryview(entries)], PAGE_BYTES)
            files.forget_pages(fd, 0, shape.head_bytes)
        finally:
            files.close(fd)
        serial = int(path.stem, 16)
        loaded = cls(files, path.parent, serial, shape, entries=entries, num_bytes=num_bytes, direct=direct)
        loaded._is_sealed = path.suffix == SEALED
        return loaded

    @property
    def name(self) -> str:
        return self._path(SEALED if self._is_sealed else UNSEALED).name

    @property
    def is_sealed(self) -> bool:
        return self._is_sealed

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Slot and digest of each, in order of the slots."""
        size = self.shape.entry_bytes
        entries = bytes(self._entries)
        for slot, start in enumerate(range(0, len(entries), size)):
            digest = digest_of(entries[start : start + size])
            if digest is not None:
                yield slot, digest

    def write(self, slot: int, digest: bytes, block: memoryview) -> None:
        """The block first, its entry afterwards: so it is there completely or not at all."""
        entry = pack_entry(digest, block, self.shape.num_parts)
        write_all(self._files, self._block_fd, block, self.shape.block_offset(slot))
        write_all(self._files, self._entry_fd, memoryview(entry), self.shape.entry_offset(slot))
        self._entries[self._entry_range(slot)] = entry

    def read(self, first_slot: int, into: Sequence[memoryview]) -> list[bool]:
        """Blocks of slots that follow one another; of a shape whose blocks are not padded, or only one. False: not the
        bytes that were written, and that buffer holds anything."""
        fd = self._open(os.O_RDONLY, direct=self._direct)
        try:
            offset = self.shape.block_offset(first_slot)
            num_bytes = read_up_to(self._files, fd, into, offset)
            if not self._direct:  # the reader keeps the blocks in memory: they need not be there twice
                self._files.forget_pages(fd, offset, num_bytes)
        finally:
            self._files.close(fd)
        num_whole = num_bytes // self.shape.block_bytes
        return [i < num_whole and self._agrees(first_slot + i, block) for i, block in enumerate(into)]

    def erase(self, slots: Iterable[int]) -> None:
        """Empty their entries, so that nobody finds the blocks at the next start either."""
        empty = memoryview(bytes(self.shape.entry_bytes))
        fd = self._open(os.O_WRONLY)
        try:
            for slot in slots:
                write_all(self._files, fd, empty, self.shape.entry_offset(slot))
        finally:
            self._files.close(fd)

    def seal(self, num_slots: int) -> None:
        """Make it durable under its final name, without the slots from `num_slots` on. Nobody writes any more."""
        self.stop_writing()
        fd = self._open(os.O_RDWR)
        try:
            if num_slots < self.shape.num_blocks:
                self.num_bytes = self.shape.block_offset(num_slots)
                self._files.truncate(fd, self.num_bytes)
            self._files.fsync(fd)
            self._files.forget_pages(fd, 0, 0)
        finally:
            self._files.close(fd)
        self._files.rename(self._path(UNSEALED), self._path(SEALED))
        self._is_sealed = True
        sync_folder(self._files, self._folder)

    def recover(self) -> None:
        """Seal what a process that died had begun, with the blocks that agree with their checksums: after a loss of
        power, an entry may be on disk and its block not. Without such blocks it stays unsealed."""
        buffer = aligned_buffer(self.shape.block_bytes)
        found = [slot for slot, _ in self.blocks()]
        whole = [slot for slot in found if self._is_whole(slot, buffer)]
        torn = set(found).difference(whole)
        logger.info("%s was left unsealed: %d of its %d blocks are whole", self.name, len(whole), len(found))
        for slot in torn:
            self._entries[self._entry_range(slot)] = bytes(self.shape.entry_bytes)
        if whole:
            self.erase(torn)
            self.seal(whole[-1] + 1)

    def _is_whole(self, slot: int, buffer: memoryview) -> bool:
        try:
            return self.read(slot, [buffer]) == [True]
        except OSError:
            return False

    def stop_writing(self) -> None:
        fds, self._block_fd, self._entry_fd = (self._block_fd, self._entry_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                self._files.close(fd)

    def remove(self) -> None:
        if not self._is_sealed:
            with contextlib.suppress(FileNotFoundError):
                return self._files.unlink(self._path(UNSEALED))
        return self._files.unlink(self._path(SEALED))

    def _agrees(self, slot: int, block: memoryview) -> bool:
        return agrees(bytes(self._entries[self._entry_range(slot)]), block, self.shape.num_parts)

    def _open(self, flags: int, *, direct: bool = False) -> int:
        if not self._is_sealed:
            with contextlib.suppress(FileNotFoundError):  # it may get its final name at this moment
                return self._files.open(self._path(UNSEALED), flags, direct=direct)
        return self._files.open(self._path(SEALED), flags, direct=direct)

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self.serial:016x}{suffix}"

    def _entry_range(self, slot: int) -> slice:
        return slice(slot * self.shape.entry_bytes, (slot + 1) * self.shape.entry_bytes)
