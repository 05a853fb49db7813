"""What earlier configurations have left on a disk: folders of layouts that no process uses. Their bytes count too."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.tiers.files import Files
from workers.tiers.folder import StoreError, make_private, remove_folder, take_ownership
from workers.tiers.segment_file import is_segment_name

logger = logging.getLogger(__name__)

_LAYOUT_NAME = re.compile(r"[0-9a-f]{32}")  # a layout_digest
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class _Layout:
    folder: Path
    num_bytes: int  # of segment files
    used_s: float  # when it was last opened or written, in seconds since the epoch


class OldLayouts:
    """Beside the layout `own` of a rank, on the disk of its node, which may hold `max_bytes` in all. Thread-safe.

    Layouts of other engines that run are in use: their ranks hold the locks of their folders. Between the start of a
    process and its taking of that lock it holds a shared lock of the whole disk (`while_opening`).
    """

    def __init__(self, files: Files, disk: Path, *, own: str, max_bytes: int) -> None:
        self._files = files
        self._disk = disk
        self._own = own
        self._max_bytes = max_bytes
        self._are_there = True  # as far as is known

    @contextlib.contextmanager
    def while_opening(self) -> Iterator[None]:
        """Nobody removes anything meanwhile. Waits while somebody does. Raises StoreError or OSError."""
        make_private(self._disk)
        with self._locked(is_shared=True):
            yield

    def make_room(self, num_bytes: int) -> None:
        """So many bytes are about to be added: remove old layouts, the least recently used first, until there is room
        for them or none is left. Never fails."""
        if not self._are_there:
            return
        try:
            with self._locked(is_shared=False) as is_locked:
                self._are_there = not is_locked or self._make_room(num_bytes)
        except OSError as err:
            logger.warning("what earlier configurations left in %s cannot be found: %s", self._disk, err)

    def _make_room(self, num_bytes: int) -> bool:
        """Returns whether old layouts may be left."""
        layouts = list(self._layouts())
        excess = sum(layout.num_bytes for layout in layouts) + num_bytes - self._max_bytes
        for layout in sorted(layouts, key=lambda layout: layout.used_s):
            if excess <= 0:
                return True
            if layout.folder.name != self._own and self._remove(layout.folder):
                logger.info("removed %s, which an earlier configuration had left", layout.folder)
                excess -= layout.num_bytes
        return False

    def _layouts(self) -> Iterator[_Layout]:
        for name in self._files.listdir(self._disk):
            if _LAYOUT_NAME.fullmatch(name):
                yield self._measure(self._disk / name)

    def _measure(self, folder: Path) -> _Layout:
        num_bytes, used_s = 0, 0.0
        for rank in self._ranks(folder):
            for name in self._files.listdir(rank):
                with contextlib.suppress(FileNotFoundError):  # a running rank has just evicted it
                    stat = self._files.stat(rank / name)
                    num_bytes += stat.st_size if is_segment_name(name) else 0
                    used_s = max(used_s, stat.st_mtime)
        return _Layout(folder, num_bytes, used_s)

    def _ranks(self, folder: Path) -> list[Path]:
        return [path for name in self._files.listdir(folder) if (path := folder / name).is_dir()]

    def _remove(self, folder: Path) -> bool:
        """False: somebody uses it, or it cannot be removed."""
        try:
            ranks = self._ranks(folder)
            with contextlib.ExitStack() as owned:
                for rank in ranks:
                    owned.callback(self._files.close, take_ownership(self._files, rank))
                for rank in ranks:
                    self._remove_rank(rank)
            self._files.rmdir(folder)
        except StoreError:
            return False
        except OSError as err:
            logger.warning("%s, which an earlier configuration left, cannot be removed: %s", folder, err)
            return False
        return True

    def _remove_rank(self, folder: Path) -> None:
        for name in filter(is_segment_name, self._files.listdir(folder)):
            self._files.unlink(folder / name)
        remove_folder(self._files, folder)

    @contextlib.contextmanager
    def _locked(self, *, is_shared: bool) -> Iterator[bool]:
        """Of the whole disk. False: not locked, because somebody opens or removes something at this moment."""
        fd = self._files.open(self._disk / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            yield self._files.lock_shared(fd) if is_shared else self._files.lock(fd)
        finally:
            self._files.close(fd)


class RoomyFiles(Files):
    """Old layouts give way before a file takes room on the disk."""

    def __init__(self, old_layouts: OldLayouts) -> None:
        self._old_layouts = old_layouts

    def allocate(self, fd: int, num_bytes: int) -> None:
        self._old_layouts.make_room(num_bytes)
        super().allocate(fd, num_bytes)
