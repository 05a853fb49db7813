"""The disk tier keeps blocks, gives back the right bytes or none, and never takes more room than it may."""

import errno
import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from childproc.segment_shape import TooFewBytesError
from workers.tiers.files import Files, aligned_buffer, aligned_buffers
from workers.tiers.folder import StoreError
from workers.tiers.layout import layout_digest
from workers.tiers.segment_store import SegmentStore

ROOT = Path(__file__).parents[2]
BLOCK_BYTES = 4096
NUM_PARTS = 4
SEGMENT_BLOCKS = 16  # of stores as small as these
SEGMENT_BYTES = (2 + SEGMENT_BLOCKS) * 4096
ENTRY_BYTES = 8 + 16 + 8 * NUM_PARTS
MAX_BYTES = 4 * SEGMENT_BYTES
LAYOUT = {"weights": "1234", "dtype": "bfloat16", "tp_size": 2}


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[SegmentStore]:
    settings = {"block_bytes": BLOCK_BYTES, "num_parts": NUM_PARTS, "max_bytes": MAX_BYTES, "layout": LAYOUT}
    store = SegmentStore.open(folder, **(settings | options))
    try:
        yield store
    finally:
        store.close()


def digest_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def contents_of(digest: bytes, num_bytes: int = BLOCK_BYTES) -> bytes:
    return random.Random(digest).randbytes(num_bytes)


def write(store: SegmentStore, number: int, num_bytes: int = BLOCK_BYTES) -> list[bytes]:
    block = aligned_buffer(num_bytes)
    block[:] = contents_of(digest_of(number), num_bytes)
    return store.write(digest_of(number), block).evicted


def write_many(store: SegmentStore, numbers: range) -> None:
    for number in numbers:
        write(store, number)


def is_there(store: SegmentStore, number: int, num_bytes: int = BLOCK_BYTES) -> bool:
    """Reads a block, which must be right if it is one."""
    into = aligned_buffer(num_bytes)
    found = store.read(digest_of(number), into)
    if found:
        assert into == contents_of(digest_of(number), num_bytes), "wrong bytes"
    return found


def read_many(store: SegmentStore, numbers: Sequence[int], num_bytes: int = BLOCK_BYTES) -> list[int]:
    """Those that are there; their bytes must be right."""
    digests = [digest_of(number) for number in numbers]
    buffers = aligned_buffers(len(numbers), num_bytes) if numbers else []
    found = store.read_many(digests, buffers)
    for digest, buffer, is_found in zip(digests, buffers, found, strict=True):
        assert not is_found or buffer == contents_of(digest, num_bytes), "wrong bytes"
    return [number for number, is_found in zip(numbers, found, strict=True) if is_found]


def those_there(store: SegmentStore, numbers: range) -> list[int]:
    return [number for number in numbers if is_there(store, number)]


def segment_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".seg", ".tmp"))


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in segment_files(folder))


@pytest.mark.parametrize(("block_bytes", "num_parts"), [(4096, 1), (16384, 4), (10240, 5), (1 << 18, 32)])
def test_blocks_come_back_at_once_and_after_a_restart(tmp_path: Path, block_bytes: int, num_parts: int) -> None:
    options = {"block_bytes": block_bytes, "num_parts": num_parts, "max_bytes": 64 * block_bytes}
    with opened(tmp_path, **options) as store:
        for number in range(20):
            write(store, number, block_bytes)
        assert all(is_there(store, number, block_bytes) for number in range(20))
    with opened(tmp_path, **options) as store:
        assert store.digests() == [digest_of(number) for number in range(20)]
        assert all(is_there(store, number, block_bytes) for number in range(20))
        assert not is_there(store, 20, block_bytes)


def test_the_first_write_of_a_block_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write(store, 1)
        store.write(digest_of(1), aligned_buffer(BLOCK_BYTES))
        assert is_there(store, 1)
        assert store.stats.num_blocks == 1


def test_buffers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for buffer in (aligned_buffer(BLOCK_BYTES - 1), aligned_buffer(BLOCK_BYTES + 64)[64:]):
            with pytest.raises(ValueError, match=r"block is 4096 bytes|aligned"):
                store.write(digest_of(1), buffer)
        with pytest.raises(ValueError, match="16 bytes"):
            store.read(b"short", aligned_buffer(BLOCK_BYTES))


@pytest.mark.parametrize("block_bytes", [4096, 10240])
def test_many_blocks_are_read_at_once(tmp_path: Path, block_bytes: int) -> None:
    with opened(tmp_path, block_bytes=block_bytes, num_parts=1, max_bytes=64 * 12288) as store:
        for number in range(40):
            write(store, number, block_bytes)
        store.drop([digest_of(9), digest_of(10)])
        numbers = [*range(40), 39, 38, 3, 99, 7, 8, 8]
        assert read_many(store, numbers, block_bytes) == [n for n in numbers if n not in (9, 10, 99)]
        assert read_many(store, [], block_bytes) == []
    damaged = segment_files(tmp_path)[0]
    with open(damaged, "r+b") as file:
        file.seek(2 * 4096 + 3 * -(-block_bytes // 4096) * 4096 + 5)
        file.write(b"x")
    with opened(tmp_path, block_bytes=block_bytes, num_parts=1, max_bytes=64 * 12288) as store:
        assert read_many(store, range(12), block_bytes) == [0, 1, 2, 4, 5, 6, 7, 8, 11]
        assert store.stats.num_checksum_failures == 1
        assert [store.take_read_trouble() for _ in range(2)] == [("", 1), ("", 0)]


# Damage


@pytest.fixture
def full_segment(tmp_path: Path) -> Path:
    with opened(tmp_path / "store") as store:
        write_many(store, range(SEGMENT_BLOCKS))
    return segment_files(tmp_path / "store")[0]


def test_a_file_cut_at_any_length_loses_blocks_and_never_gives_wrong_ones(full_segment: Path) -> None:
    whole = full_segment.read_bytes()
    for length in {near for page in range(0, len(whole) + 1, 4096) for near in (page - 1, page, page + 1)}:
        if 0 <= length <= len(whole):
            full_segment.write_bytes(whole[:length])
            with opened(full_segment.parent) as store:
                found = those_there(store, range(SEGMENT_BLOCKS))
                assert found == list(range(max(0, length - 2 * 4096) // BLOCK_BYTES))
                assert store.stats.num_checksum_failures == 0


@pytest.mark.parametrize("is_open", [False, True])
def test_a_flipped_bit_costs_the_blocks_that_it_belongs_to(full_segment: Path, is_open: bool) -> None:
    whole = full_segment.read_bytes()
    chance = random.Random(0)
    entries = range(4096, 4096 + SEGMENT_BLOCKS * ENTRY_BYTES)
    used = [*range(0, 48, 5), *entries[:ENTRY_BYTES:3], *entries[::29], *range(2 * 4096, len(whole), 3001)]
    for position in used:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(8)
        full_segment.write_bytes(whole if is_open else damaged)
        with opened(full_segment.parent) as store:
            full_segment.write_bytes(damaged)
            lost = set(range(SEGMENT_BLOCKS)) - set(those_there(store, range(SEGMENT_BLOCKS)))
        assert lost == blocks_at(position, is_open)


def blocks_at(position: int, is_open: bool) -> set[int]:
    if position >= 2 * 4096:
        return {position // BLOCK_BYTES - 2}
    if is_open:  # the entries are in memory
        return set()
    return set(range(SEGMENT_BLOCKS)) if position < 4096 else {(position - 4096) // ENTRY_BYTES}


def test_a_bad_block_is_tried_once_and_does_not_come_back(full_segment: Path) -> None:
    with open(full_segment, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"x")
    last = SEGMENT_BLOCKS - 1
    with opened(full_segment.parent) as store:
        assert not is_there(store, last)
        assert not is_there(store, last)
        assert store.stats.num_checksum_failures == 1
        assert digest_of(last) not in store.digests()
    with opened(full_segment.parent) as store:
        assert digest_of(last) not in store.digests()
        write(store, last)
        assert is_there(store, last)


def test_a_deleted_segment_is_a_miss(full_segment: Path) -> None:
    with opened(full_segment.parent) as store:
        full_segment.unlink()
        assert those_there(store, range(SEGMENT_BLOCKS)) == []
    with opened(full_segment.parent) as store:
        assert store.digests() == []


def test_dropped_blocks_stay_away_after_a_restart(full_segment: Path) -> None:
    with opened(full_segment.parent) as store:
        store.drop([digest_of(3), digest_of(5), digest_of(99)])
        assert 3 not in those_there(store, range(SEGMENT_BLOCKS))
    with opened(full_segment.parent) as store:
        assert set(those_there(store, range(SEGMENT_BLOCKS))) == set(range(SEGMENT_BLOCKS)) - {3, 5}


WRITER = """
import random, sys
from pathlib import Path
from workers.tiers.files import aligned_buffer
from workers.tiers.layout import layout_digest
from workers.tiers.segment_store import SegmentStore
options = dict(block_bytes=4096, num_parts=4, max_bytes=int(sys.argv[3]), layout=eval(sys.argv[4]))
store = SegmentStore.open(Path(sys.argv[1]), **options)
block = aligned_buffer(4096)
for number in range(int(sys.argv[2]), int(sys.argv[5])):
    digest = number.to_bytes(16, "big")
    block[:] = random.Random(digest).randbytes(4096)
    store.write(digest, block)
    print(number, flush=True)
sys.stdin.read()
"""


@contextmanager
def another_writer(folder: Path, first: int, end: int = 10**9) -> Iterator[Iterator[str]]:
    """A process that writes numbered blocks, and a line for each. It is killed at the end."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(MAX_BYTES), str(LAYOUT), str(end)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout
        finally:
            process.kill()


def test_a_killed_process_loses_nothing_that_it_had_written(tmp_path: Path) -> None:
    first = 0
    for num_lines in (3, 21, 33):
        with another_writer(tmp_path, first) as lines:
            written = [int(next(lines)) for _ in range(num_lines)]
        with opened(tmp_path) as store:
            assert those_there(store, range(first, first + num_lines)) == written
            later = len(store.digests())
            assert len(those_there(store, range(first + 200))) == later
        first += 1000


def test_blocks_that_a_loss_of_power_tore_are_cut_off_before_anyone_relies_on_them(tmp_path: Path) -> None:
    """A writer is killed in the middle of a segment. The entries of three blocks had reached the disk, but not all of
    their bytes."""
    num_unsealed = 9
    written = range(SEGMENT_BLOCKS + num_unsealed)
    with another_writer(tmp_path, 0, written.stop) as lines:
        assert [int(next(lines)) for _ in written] == list(written)
    sealed, unsealed = segment_files(tmp_path)
    assert (sealed.suffix, unsealed.suffix) == (".seg", ".tmp")
    torn = {2, num_unsealed - 2, num_unsealed - 1}
    with open(unsealed, "r+b") as file:
        for slot in torn:
            file.seek((2 + slot) * 4096 + BLOCK_BYTES // 2)
            file.write(bytes(BLOCK_BYTES // 2))
    whole = [number for number in written if number - SEGMENT_BLOCKS not in torn]
    for _ in range(2):
        with opened(tmp_path) as store:
            assert store.digests() == [digest_of(number) for number in whole]
            assert those_there(store, written) == whole
            assert store.stats.num_checksum_failures == 0
    assert segment_files(tmp_path) == [sealed, unsealed.with_suffix(".seg")]
    assert bytes_on_disk(tmp_path) == SEGMENT_BYTES + (2 + num_unsealed - 2) * 4096


def test_half_made_segments_are_removed(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    (tmp_path / "0000000000000001.tmp").write_bytes(b"")
    (tmp_path / "0000000000000002.tmp").write_bytes(bytes(SEGMENT_BYTES))
    (tmp_path / "0000000000000003.seg").write_bytes(random.Random(0).randbytes(SEGMENT_BYTES))
    (tmp_path / "notes.tmp").write_bytes(b"not ours")
    with opened(tmp_path) as store:
        assert segment_files(tmp_path) == [tmp_path / "notes.tmp"]
        assert store.stats.bytes_on_disk == 0


# Room


def test_writing_three_times_the_capacity_works(tmp_path: Path) -> None:
    expected: dict[bytes, None] = {}
    num_blocks = 3 * MAX_BYTES // BLOCK_BYTES
    with opened(tmp_path) as store:
        for number in range(num_blocks):
            evicted = write(store, number)
            expected[digest_of(number)] = None
            for digest in evicted:
                del expected[digest]
            assert bytes_on_disk(tmp_path) <= MAX_BYTES + SEGMENT_BYTES
            assert store.digests() == list(expected)
        assert store.stats.bytes_on_disk == bytes_on_disk(tmp_path)
        assert len(expected) >= 3 * SEGMENT_BLOCKS
        assert those_there(store, range(num_blocks)) == list(range(num_blocks - len(expected), num_blocks))
    assert bytes_on_disk(tmp_path) <= MAX_BYTES


def test_blocks_that_were_read_outlive_their_segment_once(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write_many(store, range(SEGMENT_BLOCKS))
        assert is_there(store, 2)
        assert is_there(store, 7)
        evicted: list[bytes] = []
        while store.stats.num_rewritten == 0:
            evicted += write(store, SEGMENT_BLOCKS + store.stats.num_blocks + len(evicted))
        assert set(evicted) == {digest_of(number) for number in range(SEGMENT_BLOCKS)} - {digest_of(2), digest_of(7)}
        number = 1000
        while store.stats.num_evicted < 6 * SEGMENT_BLOCKS:
            write(store, number := number + 1)
        assert store.stats.num_rewritten == 2
        assert not is_there(store, 2)


def test_a_block_dropped_while_it_is_rewritten_stays_away(tmp_path: Path) -> None:
    files = Faulty()

    def drop(name: str, *args: Any, **options: Any) -> None:
        if name == "preadv":
            store.drop([digest_of(2)])

    with opened(tmp_path, files=files) as store:
        write_many(store, range(SEGMENT_BLOCKS))
        assert is_there(store, 2)
        files.fault = drop
        write_many(store, range(100, 100 + MAX_BYTES // BLOCK_BYTES))
        files.fault = None
        assert digest_of(2) not in store.digests()
    with opened(tmp_path) as store:
        assert digest_of(0) not in store.digests()
        assert digest_of(2) not in store.digests()


def test_a_store_whose_blocks_are_all_in_use_still_takes_new_ones(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for number in range(5 * MAX_BYTES // BLOCK_BYTES):
            before = store.stats.num_rewritten
            write(store, number)
            assert store.stats.num_rewritten - before <= SEGMENT_BLOCKS // 2
            assert is_there(store, number)
        assert store.stats.num_rewritten > 0
        assert bytes_on_disk(tmp_path) <= MAX_BYTES


def test_bytes_of_an_earlier_process_count(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write_many(store, range(40))
        before = store.stats
    with opened(tmp_path) as store:
        assert store.stats.num_blocks == before.num_blocks
        assert store.stats.bytes_on_disk == bytes_on_disk(tmp_path)
        for number in range(40, 100):
            write(store, number)
            assert bytes_on_disk(tmp_path) <= MAX_BYTES + SEGMENT_BYTES
    with opened(tmp_path, max_bytes=2 * SEGMENT_BYTES) as store:
        assert bytes_on_disk(tmp_path) <= 2 * SEGMENT_BYTES
        assert digest_of(99) in store.digests()


def test_two_segments_are_the_minimum(tmp_path: Path) -> None:
    problem = f"100,000 bytes .* take {2 * SEGMENT_BYTES:,}"
    with pytest.raises(TooFewBytesError, match=problem), opened(tmp_path, max_bytes=100_000):
        pass


@pytest.mark.parametrize("max_bytes", [5 << 20, 100 << 20, 999 << 20, 500 << 30])
def test_segments_use_nearly_all_of_their_room(tmp_path: Path, max_bytes: int) -> None:
    block_bytes = 64 << 10
    with opened(tmp_path, block_bytes=block_bytes, max_bytes=max_bytes) as store:
        assert 0.93 * max_bytes < store.capacity * block_bytes <= max_bytes


# Whose folder it is


def test_a_second_owner_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    with another_writer(tmp_path, 0) as lines:
        assert next(lines) == "0\n"
        owner = f"pid [0-9]+ on {socket.gethostname()}"
        with pytest.raises(StoreError, match=f"{tmp_path} belongs to {owner}; .*read_only"), opened(tmp_path):
            pass
    with opened(tmp_path), pytest.raises(StoreError, match=f"pid {os.getpid()} on "), opened(tmp_path):
        pass
    with opened(tmp_path) as store:
        assert store.digests()


def test_a_reader_sees_what_the_owner_has_sealed(tmp_path: Path) -> None:
    with opened(tmp_path, read_only=True) as early:
        assert not is_there(early, 1)
        with opened(tmp_path) as owner:
            for number in range(SEGMENT_BLOCKS + 3):
                write(owner, number)
            with opened(tmp_path, read_only=True) as reader:
                assert those_there(reader, range(20)) == list(range(SEGMENT_BLOCKS))
                with pytest.raises(StoreError, match="read-only"):
                    write(reader, 50)
                for number in range(100, 200):
                    write(owner, number)
                assert not is_there(reader, 1)
                gone = reader.refresh()
                assert digest_of(2) in gone
                assert set(reader.digests()) < set(owner.digests())
                assert is_there(reader, 150)
                assert reader.stats.num_read_errors == 0
        early.refresh()
        assert is_there(early, 199)


@pytest.mark.parametrize("key", ["weights", "tp_size", "num_parts"])
def test_blocks_of_another_layout_are_refused(full_segment: Path, key: str) -> None:
    options: dict[str, Any] = {"layout": LAYOUT | {key: 7}} if key in LAYOUT else {key: 2}
    found = json.loads((full_segment.parent / "layout.json").read_text())
    with pytest.raises(StoreError, match=f"{key} {found[key]!r}, not ."), opened(full_segment.parent, **options):
        pass
    with opened(full_segment.parent) as store:
        assert len(store.digests()) == SEGMENT_BLOCKS


def test_a_segment_from_a_folder_of_another_layout_is_not_read(full_segment: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "other", layout=LAYOUT | {"weights": "5678"}):
        pass
    full_segment.rename(tmp_path / "other" / full_segment.name)
    with opened(tmp_path / "other", layout=LAYOUT | {"weights": "5678"}) as store:
        assert store.digests() == []


def test_only_the_owner_of_the_files_can_read_them(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    before = os.umask(0)
    try:
        with opened(folder) as store:
            write(store, 1)
            during = list(folder.iterdir())
            assert {stat.S_IMODE(path.stat().st_mode) for path in during} == {0o600}
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    folder.chmod(0o755)
    with opened(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# A file system that misbehaves


class Faulty(Files):
    """Calls `fault(call, *args)` before each call; it may raise, wait, or return a result to be used instead."""

    def __init__(self) -> None:
        self.fault: Callable[..., Any] | None = None


def _with_fault(name: str) -> Callable[..., Any]:
    def call(self: Faulty, *args: Any, **options: Any) -> Any:
        instead = self.fault(name, *args, **options) if self.fault else None
        return getattr(Files, name)(self, *args, **options) if instead is None else instead

    return call


for _name in ("open", "close", "pwrite", "preadv", "allocate", "truncate", "fsync", "rename", "unlink", "listdir"):
    setattr(Faulty, _name, _with_fault(_name))


def failing(call: str, code: int, *, after: int = 0) -> Callable[..., None]:
    """Raises in every such call, but for the first `after`."""
    left = [after]

    def fault(name: str, *args: Any, **options: Any) -> None:
        if name == call:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))

    return fault


class Full:
    """A disk with room for `num_bytes` more: the write that meets its end is cut, the next one fails."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def __call__(self, name: str, *args: Any, **options: Any) -> int | None:
        if name != "pwrite":
            return None
        fd, data, offset = args
        if not self._left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_bytes = min(self._left, len(data))
        self._left -= num_bytes
        return os.pwrite(fd, data[:num_bytes], offset)


@pytest.mark.parametrize("room", [0, 512, 2048, 4096, 4096 + 20])
def test_a_disk_that_is_full_half_way_through_a_block(tmp_path: Path, room: int) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store:
        write(store, 1)
        files.fault = Full(room)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                write(store, 2)
            assert not is_there(store, 2)
        assert store.digests() == [digest_of(1)]
        files.fault = None
        write(store, 3)
    with opened(tmp_path) as store:
        assert those_there(store, range(5)) == [1, 3]
        write(store, 2)
        assert is_there(store, 2)


@pytest.mark.parametrize(("call", "code"), [("open", errno.EMFILE), ("allocate", errno.ENOSPC), ("pwrite", errno.EIO)])
def test_a_segment_that_cannot_be_made_leaves_nothing(tmp_path: Path, call: str, code: int) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store:
        files.fault = failing(call, code)
        with pytest.raises(OSError, match=os.strerror(code)):
            write(store, 1)
        assert segment_files(tmp_path) == []
        assert store.stats.bytes_on_disk == 0
        files.fault = None
        write(store, 1)
        assert is_there(store, 1)


@pytest.mark.parametrize("call", ["fsync", "rename", "truncate"])
def test_a_segment_that_cannot_be_sealed_is_removed_and_reported(tmp_path: Path, call: str) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store:
        write_many(store, range(SEGMENT_BLOCKS - 1))
        files.fault = failing(call, errno.EIO)
        if call == "truncate":
            store.close()
        else:
            with pytest.raises(OSError, match="Input/output"):
                write(store, SEGMENT_BLOCKS - 1)
            files.fault = None
            assert set(write(store, 99)) == {digest_of(number) for number in range(SEGMENT_BLOCKS)}
    with opened(tmp_path) as store:
        assert store.digests() == ([] if call == "truncate" else [digest_of(99)])


def test_a_block_that_cannot_be_read_is_a_miss_and_dropped(tmp_path: Path) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store:
        write(store, 1)
        write(store, 2)
        files.fault = failing("preadv", errno.EIO)
        assert not is_there(store, 1)
        files.fault = None
        assert those_there(store, range(5)) == [2]
        assert store.stats.num_read_errors == 1


def test_segments_that_cannot_be_removed_still_count(tmp_path: Path) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store:
        files.fault = failing("unlink", errno.EROFS)
        with pytest.raises(OSError, match="or cannot be removed"):
            write_many(store, range(1000))
        assert bytes_on_disk(tmp_path) <= MAX_BYTES + SEGMENT_BYTES


def test_short_reads_and_writes_are_continued(tmp_path: Path) -> None:
    files = Faulty()

    def one_page(name: str, *args: Any, **options: Any) -> int | None:
        if name == "pwrite":
            return os.pwrite(args[0], args[1][:4096], args[2])
        return os.preadv(args[0], [args[1][0][:4096]], args[2]) if name == "preadv" else None

    options = {"files": files, "block_bytes": 10240, "num_parts": 5, "max_bytes": 1 << 20}  # too odd for direct I/O
    with opened(tmp_path, **options) as store:
        files.fault = one_page
        write(store, 1, 10240)
        assert is_there(store, 1, 10240)


def test_a_read_of_many_blocks_that_stops_anywhere_continues(tmp_path: Path) -> None:
    files = Faulty()
    chance = random.Random(0)

    def some_pages(name: str, *args: Any, **options: Any) -> int | None:
        if name != "preadv":
            return None
        fd, buffers, offset = args
        whole = chance.randrange(len(buffers))
        return os.preadv(fd, [*buffers[:whole], buffers[whole][: chance.randrange(1, 4) * 4096]], offset)

    with opened(tmp_path, files=files, block_bytes=16384, max_bytes=1 << 20) as store:
        for number in range(30):
            write(store, number, 16384)
        files.fault = some_pages
        assert read_many(store, range(30), 16384) == list(range(30))


def test_one_unreadable_block_of_many_costs_only_itself(tmp_path: Path) -> None:
    files = Faulty()
    bad = 2 * 4096 + 5 * BLOCK_BYTES

    def unreadable(name: str, *args: Any, **options: Any) -> None:
        if name == "preadv" and args[2] <= bad < args[2] + sum(map(len, args[1])):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path, files=files) as store:
        write_many(store, range(10))
        files.fault = unreadable
        assert read_many(store, range(10)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert store.stats.num_read_errors == 1


def test_a_file_system_without_direct_io(tmp_path: Path) -> None:
    files = Faulty()

    def refuse(name: str, *args: Any, **options: Any) -> None:
        if options.get("direct"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    files.fault = refuse
    with opened(tmp_path, files=files) as store:
        write_many(store, range(20))
        assert those_there(store, range(20)) == list(range(20))


class Hang:
    """Stops the first call of that name that comes after `arm`, until `end`."""

    def __init__(self, call: str) -> None:
        self._call = call
        self._armed = threading.Lock()
        self.has_begun = threading.Event()
        self.end = threading.Event()

    def __call__(self, name: str, *args: Any, **options: Any) -> None:
        if name == self._call and self._armed.acquire(blocking=False):
            self.has_begun.set()
            assert self.end.wait(60)


@pytest.mark.parametrize("call", ["preadv", "close"])
def test_a_hanging_read_delays_nobody_else(tmp_path: Path, call: str) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store, ThreadPoolExecutor() as threads:
        write_many(store, range(20))
        files.fault = hang = Hang(call)
        hung = threads.submit(is_there, store, 0)
        assert hang.has_begun.wait(60)
        others = threads.submit(write_many, store, range(100, 200))
        try:
            others.result(60)
            assert is_there(store, 199)
            assert digest_of(199) in store.digests()
            assert bytes_on_disk(tmp_path) <= MAX_BYTES + SEGMENT_BYTES
            # the segment that the hung read holds is unlinked, but its bytes are not free
            assert store.stats.bytes_on_disk == bytes_on_disk(tmp_path) + SEGMENT_BYTES
        finally:
            hang.end.set()
        assert hung.result(60)
        assert store.stats.bytes_on_disk == bytes_on_disk(tmp_path)


@pytest.mark.parametrize("call", ["pwrite", "allocate", "fsync", "rename", "unlink"])
def test_a_hanging_write_delays_nobody_else(tmp_path: Path, call: str) -> None:
    files = Faulty()
    with opened(tmp_path, files=files) as store, ThreadPoolExecutor() as threads:
        write_many(store, range(3 * SEGMENT_BLOCKS))
        files.fault = hang = Hang(call)
        hung = threads.submit(write_many, store, range(100, 150))
        assert hang.has_begun.wait(60)
        others = threads.submit(write_many, store, range(300, 340))
        try:
            others.result(60)
            assert is_there(store, 339)
            assert bytes_on_disk(tmp_path) <= MAX_BYTES + SEGMENT_BYTES
        finally:
            hang.end.set()
        hung.result(60)
        assert bytes_on_disk(tmp_path) <= MAX_BYTES + SEGMENT_BYTES
        assert store.stats.bytes_on_disk == bytes_on_disk(tmp_path)


def test_a_folder_stays_locked_while_a_write_hangs_in_it(tmp_path: Path) -> None:
    files = Faulty()
    with ThreadPoolExecutor() as threads, opened(tmp_path, files=files) as store:
        write(store, 1)
        files.fault = hang = Hang("pwrite")
        hung = threads.submit(write, store, 2)
        assert hang.has_begun.wait(60)
        store.close()
        with pytest.raises(StoreError, match="belongs to"), opened(tmp_path):
            pass
        hang.end.set()
        hung.result(60)


@pytest.mark.parametrize("error_every", [0, 50])
def test_many_threads_read_and_write_at_random(tmp_path: Path, error_every: int) -> None:
    files = Faulty()
    num_calls = iter(range(10**9))

    def fail_sometimes(name: str, *args: Any, **options: Any) -> None:
        if name in ("pwrite", "preadv", "fsync") and next(num_calls) % error_every == 7:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def go(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(400):
            number = chance.randrange(150)
            kind = chance.random()
            if kind < 0.5:
                is_there(store, number)
            elif kind < 0.95:
                try:
                    write(store, number)
                except OSError:
                    assert error_every
            else:
                store.drop([digest_of(number)])
            assert store.stats.bytes_on_disk <= MAX_BYTES + SEGMENT_BYTES

    with opened(tmp_path, files=files) as store:
        files.fault = fail_sometimes if error_every else None
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(go, range(6)))
        files.fault = None
        assert store.stats.bytes_on_disk == bytes_on_disk(tmp_path)
        if not error_every:
            assert len(those_there(store, range(150))) == store.stats.num_blocks == len(store.digests())
            assert store.stats.num_checksum_failures == 0
        there = set(those_there(store, range(150)))
    with opened(tmp_path) as store:
        assert there <= set(those_there(store, range(150)))


def test_a_real_full_disk(tmp_path: Path) -> None:
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={3 * SEGMENT_BYTES}", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        with opened(tmp_path / "store") as store:
            with pytest.raises(OSError, match="No space"):
                write_many(store, range(100))
            there = store.digests()
            assert len(there) == 2 * SEGMENT_BLOCKS
            assert those_there(store, range(100)) == list(range(len(there)))
        with opened(tmp_path / "store") as store:
            assert store.digests() == there
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_name_of_a_layout_depends_only_on_its_facts() -> None:
    facts: dict[str, str | int | bool] = {"a": 1, "b": True, "c": "x"}
    assert layout_digest(facts) == layout_digest(dict(reversed(facts.items())))
    others = [{**facts, "a": "1"}, {**facts, "a": True}, {**facts, "d": 0}, {"a": 1, "b": True}, {**facts, "c": "y"}]
    assert len({layout_digest(other) for other in [facts, *others]}) == 6
