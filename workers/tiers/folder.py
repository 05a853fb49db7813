"""Who owns a folder and what its blocks are: `lock` and `layout.json`, next to the segments."""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from childproc.segment_shape import PAGE_BYTES
from workers.tiers.files import Files, aligned_buffer, read_up_to, sync_folder, write_all

_LOCK = "lock"
_LAYOUT = "layout.json"
_MAX_TEXT_BYTES = 1 << 16


class StoreError(ValueError):
    """A folder cannot be used as asked. Says what was found and what to do."""


def make_private(folder: Path) -> None:
    """Make the folder and those above it that are missing; nobody else may read it. Raises StoreError."""
    try:
        for path in reversed([folder, *folder.parents]):
            if not path.exists():
                path.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_mode & 0o777 != 0o700:
            folder.chmod(0o700)
    except OSError as err:
        raise StoreError(f"{folder} cannot be made private to this user ({err}); give another folder") from None


def take_ownership(files: Files, folder: Path) -> int:
    """Lock the folder for this process until the file descriptor that is returned is closed. Raises StoreError."""
    fd = files.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        if not files.lock(fd):
            owner = _read_text(files, fd).strip() or "another process"
            raise StoreError(
                f"{folder} belongs to {owner}; stop that process, give each deployment a folder of its own, "
                "or set read_only"
            )
        files.truncate(fd, 0)
        write_all(files, fd, memoryview(f"pid {os.getpid()} on {socket.gethostname()}\n".encode()), 0)
    except BaseException:
        files.close(fd)
        raise
    return fd


def remove_folder(files: Files, folder: Path) -> None:
    """Its owner has removed the segments and now gives it up. Raises OSError if anything else is in it."""
    for name in (_LAYOUT, f"{_LAYOUT}.new", _LOCK):
        with contextlib.suppress(FileNotFoundError):
            files.unlink(folder / name)
    files.rmdir(folder)


def check_layout(files: Files, folder: Path, layout: Mapping[str, Any]) -> bool:
    """False: the folder does not say what its blocks are, or not readably. Raises StoreError if they are others."""
    try:
        fd = files.open(folder / _LAYOUT, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        found = json.loads(_read_text(files, fd))
    except ValueError:
        return False
    finally:
        files.close(fd)
    _compare(folder, found if isinstance(found, dict) else {}, layout)
    return True


def write_layout(files: Files, folder: Path, layout: Mapping[str, Any]) -> None:
    """For people, and for `check_layout`. Raises OSError."""
    temporary = folder / f"{_LAYOUT}.new"
    fd = files.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(files, fd, memoryview((json.dumps(layout, indent=2) + "\n").encode()), 0)
        files.fsync(fd)
    finally:
        files.close(fd)
    files.rename(temporary, folder / _LAYOUT)
    sync_folder(files, folder)


def has_direct_io(files: Files, folder: Path) -> bool:
    """Whether the file system reads past the page cache. Asks with the layout's file, which must be there."""
    try:
        fd = files.open(folder / _LAYOUT, os.O_RDONLY, direct=True)
    except OSError:
        return False
    try:
        return files.preadv(fd, [aligned_buffer(PAGE_BYTES)], 0) > 0
    except OSError:
        return False
    finally:
        files.close(fd)


def _compare(folder: Path, found: dict[str, Any], expected: Mapping[str, Any]) -> None:
    for key in [*expected, *(key for key in found if key not in expected)]:
        if json.dumps(found.get(key)) != json.dumps(expected.get(key)):  # 1 is not true
            raise StoreError(
                f"{folder / _LAYOUT}: the blocks there have {key} {found.get(key)!r}, not {expected.get(key)!r}; "
                "delete the folder or give another"
            )


def _read_text(files: Files, fd: int) -> str:
    buffer = memoryview(bytearray(_MAX_TEXT_BYTES))
    return bytes(buffer[: read_up_to(files, fd, [buffer], 0)]).decode(errors="replace")
