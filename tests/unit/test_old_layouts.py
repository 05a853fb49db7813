"""What earlier configurations have left on a disk gives way to new blocks, and nothing else does."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers.tiers.files import Files, aligned_buffer
from workers.tiers.layout import layout_digest
from workers.tiers.old_layouts import OldLayouts, RoomyFiles
from workers.tiers.segment_store import SegmentStore

BLOCK_BYTES = 4096
SEGMENT_BYTES = (2 + 16) * 4096
SHARE = 4 * SEGMENT_BYTES  # of one rank


class Disk:
    """Of a node, for so many full ranks."""

    def __init__(self, path: Path, *, num_ranks: int, files: Files | None = None) -> None:
        self.path = path
        self.max_bytes = num_ranks * SHARE
        self._files = files or Files()

    def layouts(self, name: str) -> OldLayouts:
        return OldLayouts(self._files, self.path, own=layout_digest({"weights": name}), max_bytes=self.max_bytes)

    def folder(self, name: str) -> Path:
        return self.path / layout_digest({"weights": name})

    @contextmanager
    def opened(self, name: str, rank: int = 0) -> Iterator[SegmentStore]:
        """The store of one rank of an engine with these weights."""
        layouts = self.layouts(name)
        with layouts.while_opening():
            store = SegmentStore.open(
                self.folder(name) / f"target-rank{rank}of2",
                block_bytes=BLOCK_BYTES,
                num_parts=1,
                max_bytes=SHARE,
                layout={"weights": name, "rank": rank},
                files=RoomyFiles(layouts),
            )
        try:
            yield store
        finally:
            store.close()

    def fill(self, name: str, *, used_s: int) -> None:
        """A configuration that was last used then has left as much as it might."""
        for rank in range(2):
            with self.opened(name, rank) as store:
                write(store, range(4 * 16))
        for path in self.folder(name).rglob("*"):
            os.utime(path, (used_s, used_s))

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.suffix in (".seg", ".tmp"))


def write(store: SegmentStore, numbers: range) -> None:
    for number in numbers:
        store.write(number.to_bytes(16, "big"), aligned_buffer(BLOCK_BYTES))


def test_the_least_recently_used_goes_first_and_only_as_far_as_needed(tmp_path: Path) -> None:
    disk = Disk(tmp_path, num_ranks=4)
    disk.fill("older", used_s=1_000)
    disk.fill("newer", used_s=2_000)
    assert disk.num_bytes == disk.max_bytes
    with disk.opened("mine") as store:
        assert disk.num_bytes == disk.max_bytes, "nothing was written"
        write(store, range(16))
        assert not disk.folder("older").exists()
        assert disk.folder("newer").exists()
    with disk.opened("newer") as store:
        assert len(store.digests()) == 4 * 16


def test_bytes_on_disk_with_those_of_old_layouts_stay_within_the_limit(tmp_path: Path) -> None:
    disk = Disk(tmp_path, num_ranks=2)
    disk.fill("old", used_s=1_000)
    for name in ("mine", "next"):
        with disk.opened(name, 0) as first, disk.opened(name, 1) as second:
            for start in range(0, 200, 8):
                for store in (first, second):
                    write(store, range(start, start + 8))
                    assert disk.num_bytes <= disk.max_bytes + 2 * SEGMENT_BYTES
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [disk.folder(name).name]


def test_a_layout_in_use_stays(tmp_path: Path) -> None:
    """Even if it is that of one rank only, and the disk is too small."""
    disk = Disk(tmp_path, num_ranks=2)
    disk.fill("other", used_s=1_000)
    with disk.opened("other", 1), disk.opened("mine") as store:
        write(store, range(4 * 16))
    with disk.opened("other", 0) as other:
        assert len(other.digests()) == 4 * 16


def test_nothing_is_removed_while_a_process_opens_its_folder(tmp_path: Path) -> None:
    disk = Disk(tmp_path, num_ranks=2)
    disk.fill("old", used_s=1_000)
    with disk.opened("mine") as store:
        with disk.layouts("old").while_opening():
            write(store, range(16))
            assert disk.folder("old").exists()
        write(store, range(16, 32))
        assert not disk.folder("old").exists()


@pytest.mark.parametrize("name", ["notes", "0123456789abcdef" * 2])
def test_files_of_others_stay(tmp_path: Path, name: str) -> None:
    disk = Disk(tmp_path, num_ranks=2)
    disk.fill("old", used_s=1_000)
    mine = tmp_path / name / "target-rank0of1" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for path in (mine, mine.parent):
        os.utime(path, (500, 500))
    with disk.opened("mine") as store:
        write(store, range(16))
    assert mine.read_text() == "mine"
    assert not disk.folder("old").exists()


def test_an_old_layout_that_cannot_be_removed_stops_no_write(tmp_path: Path) -> None:
    class Stuck(Files):
        def rmdir(self, folder: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    Disk(tmp_path, num_ranks=2).fill("old", used_s=1_000)
    with Disk(tmp_path, num_ranks=2, files=Stuck()).opened("mine") as store:
        write(store, range(20))
        assert len(store.digests()) == 20
