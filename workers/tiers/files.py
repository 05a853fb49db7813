"""The file system as the disk tier uses it, and the buffers that it reads into and writes from."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from childproc.segment_shape import PAGE_BYTES, page_aligned

_HUGE_PAGE_BYTES = 2 << 20


class Files:
    """Calls of the operating system, one for each method, all of which raise OSError. Tests derive from it and let a
    call fail, stop half-way or hang. Thread-safe."""

    def open(self, path: Path, flags: int, *, direct: bool = False) -> int:
        """`direct` passes over the page cache. A file that is made is its owner's alone."""
        if direct and sys.platform == "linux":
            flags |= os.O_DIRECT
        return os.open(path, flags, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, into: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, into, offset)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Take room on the disk at once, so that it is not missing later."""
        if sys.platform == "linux":
            os.posix_fallocate(fd, 0, num_bytes)
        else:
            os.ftruncate(fd, num_bytes)

    def truncate(self, fd: int, num_bytes: int) -> None:
        os.ftruncate(fd, num_bytes)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def forget_pages(self, fd: int, offset: int, num_bytes: int) -> None:
        """Take clean pages of a file out of the page cache. `num_bytes` 0: all from `offset` on."""
        if sys.platform == "linux":
            os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, folder: Path) -> None:
        os.rmdir(folder)

    def listdir(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def stat(self, path: Path) -> os.stat_result:
        return os.stat(path)

    def lock_shared(self, fd: int) -> bool:
        """Waits until nobody else holds an exclusive lock. The lock lasts until the file is closed."""
        fcntl.flock(fd, fcntl.LOCK_SH)
        return True

    def lock(self, fd: int) -> bool:
        """Whether the file could be locked for this process. The lock lasts until the file is closed."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def aligned_buffer(num_bytes: int) -> memoryview:
    """Zeroed bytes at an address that direct I/O accepts. Freed with the last view of it."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE_BYTES and sys.platform == "linux":
        # The disk gets larger requests. Direct reads of 8 MiB from a virtual disk: 1.4 instead of 0.4 GB/s.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def aligned_buffers(num_buffers: int, num_bytes: int) -> list[memoryview]:
    """Such buffers, side by side: direct I/O into all of them at once is faster than into scattered ones."""
    stride = page_aligned(num_bytes)
    memory = aligned_buffer(num_buffers * stride)
    return [memory[start : start + num_bytes] for start in range(0, len(memory), stride)]


def is_aligned(buffer: memoryview) -> bool:
    """Whether direct I/O accepts the address. `buffer` must be writable."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE_BYTES == 0


def write_all(files: Files, fd: int, data: memoryview, offset: int) -> None:
    """Raises OSError unless every byte was written."""
    while data:
        written = files.pwrite(fd, data, offset)
        if not written:
            raise OSError(f"nothing could be written at byte {offset}")
        data, offset = data[written:], offset + written


def read_up_to(files: Files, fd: int, into: Sequence[memoryview], offset: int) -> int:
    """Fill the buffers, one after another; returns the number of bytes read, which is less only at the end of the file.
    Raises OSError."""
    done = 0
    while into and (count := files.preadv(fd, into, offset + done)):
        done += count
        into = _without(into, count)
    return done


def _without(buffers: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What follows the first bytes."""
    left = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:])
        num_bytes = max(0, num_bytes - len(buffer))
    return left


def sync_folder(files: Files, folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    fd = files.open(folder, os.O_RDONLY)
    try:
        files.fsync(fd)
    finally:
        files.close(fd)
