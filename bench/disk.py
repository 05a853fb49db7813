"""What the disk tier makes of a disk: its reads and writes beside plain ones of the same files, and the scan at start.

    python -m bench.disk --folder /var/lib/echelon/bench --block-kib 160 640 2560 --save

Every round reads the same files in all ways, one after another, each time with a cold page cache: plainly in order by
one thread, buffered, 1 MiB at a time, which is the yardstick; the same past the page cache, 8 MiB at a time into huge
pages; and through the store by 1 and by 4 threads, one block a call and in calls of 8 MiB. Give a folder on the disk in
question. A virtual disk may cache on its own.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.report import Spread, add_report_options, publish, table
from workers.tiers.files import aligned_buffer, aligned_buffers
from workers.tiers.segment_store import SegmentStore

LAYOUT = {"made_by": "bench.disk"}
NUM_PARTS = 20
NUM_THREADS = 4
WAYS = (  # name, threads, bytes a call
    ("store, 1 thread", 1, 0),
    ("4 threads", NUM_THREADS, 0),
    ("1 thread, 8 MiB a call", 1, 8 << 20),
    ("4 threads, 8 MiB a call", NUM_THREADS, 8 << 20),
)


def open_store(folder: Path, block_bytes: int, num_blocks: int) -> SegmentStore:
    max_bytes = 2 * num_blocks * block_bytes + (256 << 20)
    return SegmentStore.open(folder, block_bytes=block_bytes, num_parts=NUM_PARTS, max_bytes=max_bytes, layout=LAYOUT)


def in_threads(num_threads: int, work: Callable[[int], None]) -> float:
    """Seconds until work(0), work(1), ... are done, each in a thread."""
    with ThreadPoolExecutor(num_threads) as threads:
        started_s = time.perf_counter()
        list(threads.map(work, range(num_threads)))
        return time.perf_counter() - started_s


def write_blocks(folder: Path, block_bytes: int, num_blocks: int, num_threads: int) -> float:
    """Seconds until all are durable."""
    shutil.rmtree(folder, ignore_errors=True)
    store = open_store(folder, block_bytes, num_blocks)
    contents = os.urandom(block_bytes)

    def work(thread: int) -> None:
        block = aligned_buffer(block_bytes)
        block[:] = contents
        for number in range(thread, num_blocks, num_threads):
            digest = number.to_bytes(16, "big")
            block[:16] = digest
            store.write(digest, block)

    took_s = in_threads(num_threads, work)
    started_s = time.perf_counter()
    store.close()
    return took_s + time.perf_counter() - started_s


def write_plainly(folder: Path, num_bytes: int) -> float:
    """Seconds for one file in writes of 8 MiB past the page cache, until it is durable."""
    path = folder / "plain"
    buffer = aligned_buffer(8 << 20)
    buffer[:] = os.urandom(len(buffer))
    started_s = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(fd, 0, num_bytes)
    for offset in range(0, num_bytes, len(buffer)):
        os.pwrite(fd, buffer, offset)
    os.fsync(fd)
    os.close(fd)
    took_s = time.perf_counter() - started_s
    path.unlink()
    return took_s


def read_blocks(store: SegmentStore, block_bytes: int, num_threads: int, blocks_per_call: int) -> float:
    """Seconds for all, in the order in which they were written."""
    digests = store.digests()

    def work(thread: int) -> None:
        buffers = aligned_buffers(blocks_per_call, block_bytes)
        for start in range(thread * blocks_per_call, len(digests), num_threads * blocks_per_call):
            wanted = digests[start : start + blocks_per_call]
            if not all(store.read_many(wanted, buffers[: len(wanted)])):
                raise SystemExit("a block is missing")

    return in_threads(num_threads, work)


def read_plainly(paths: Sequence[Path], *, flags: int, request_bytes: int) -> float:
    """Seconds for one thread."""
    into = aligned_buffer(request_bytes)
    started_s = time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY | flags)
        offset = 0
        while count := os.preadv(fd, [into], offset):
            offset += count
        os.close(fd)
    return time.perf_counter() - started_s


def forget(paths: Sequence[Path]) -> None:
    """Empty the page cache of these files."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure_reads(folder: Path, block_bytes: int, num_blocks: int, num_rounds: int) -> dict[str, Spread]:
    """GB/s of each way."""
    paths = sorted(folder.glob("*.seg"))
    store = open_store(folder, block_bytes, num_blocks)
    file_bytes = sum(path.stat().st_size for path in paths)
    speeds: dict[str, list[float]] = {}

    def note(way: str, num_bytes: int, seconds: float) -> None:
        speeds.setdefault(way, []).append(num_bytes / seconds / 1e9)
        forget(paths)

    forget(paths)
    for _ in range(num_rounds):
        note("buffered", file_bytes, read_plainly(paths, flags=0, request_bytes=1 << 20))
        note("direct", file_bytes, read_plainly(paths, flags=os.O_DIRECT, request_bytes=8 << 20))
        for way, num_threads, call_bytes in WAYS:
            blocks_per_call = max(1, call_bytes // block_bytes)
            note(way, block_bytes * num_blocks, read_blocks(store, block_bytes, num_threads, blocks_per_call))
    store.close()
    return {way: Spread.of(values) for way, values in speeds.items()}


def measure_scan(folder: Path, block_bytes: int, num_blocks: int) -> float:
    """Seconds to open a store of that many blocks with a cold page cache."""
    forget(sorted(folder.glob("*.seg")))
    started_s = time.perf_counter()
    store = open_store(folder, block_bytes, num_blocks)
    took_s = time.perf_counter() - started_s
    if len(store.digests()) != num_blocks:
        raise SystemExit("the scan missed blocks")
    store.close()
    return took_s


def measure(folder: Path, block_bytes: int, num_bytes: int, num_rounds: int) -> list[str]:
    """A row of the table."""
    num_blocks = num_bytes // block_bytes
    folder.mkdir(parents=True, exist_ok=True)
    writes: dict[int, list[float]] = {1: [], NUM_THREADS: []}
    plain_writes, scans = [], []
    for _ in range(num_rounds):
        plain_writes.append(num_bytes / write_plainly(folder, num_bytes) / 1e9)
        for num_threads, speeds in writes.items():
            seconds = write_blocks(folder / "store", block_bytes, num_blocks, num_threads)
            speeds.append(num_blocks * block_bytes / seconds / 1e9)
        scans.append(num_blocks / measure_scan(folder / "store", block_bytes, num_blocks) / 1e3)
    reads = measure_reads(folder / "store", block_bytes, num_blocks, num_rounds)
    shutil.rmtree(folder / "store")
    plain = reads["buffered"].median
    shares = [
        f"{reads[way]:.2f}, {100 * reads[way].median / plain:.0f} %" for way in ("direct", *(w for w, *_ in WAYS))
    ]
    written = [f"{Spread.of(speeds):.2f}" for speeds in (plain_writes, *writes.values())]
    return [f"{block_bytes >> 10}", f"{reads['buffered']:.2f}", *shares, *written, f"{Spread.of(scans):.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; is made and emptied")
    parser.add_argument("--block-kib", type=int, nargs="+", default=[160, 640, 2560], help="multiples of 20")
    parser.add_argument("--mib", type=int, default=1024, help="size of the store")
    parser.add_argument("--rounds", type=int, default=3)
    add_report_options(parser)
    args = parser.parse_args()
    header = ["block KiB", "plain read", "direct, 8 MiB a call", *(way for way, *_ in WAYS)]
    header += ["plain write", "store writes, 1 thread", "4 threads", "scan, 1000 blocks/s"]
    rows = [measure(args.folder, kib << 10, args.mib << 20, args.rounds) for kib in args.block_kib]
    body = (
        f"{args.mib} MiB in blocks of {NUM_PARTS} layers, {args.rounds} rounds: median (least-greatest) in GB/s, "
        f"and the share of the plain read.\n\n{table(header, rows)}"
    )
    options = f"--block-kib {' '.join(map(str, args.block_kib))} --mib {args.mib} --rounds {args.rounds}"
    publish("disk", body, command=f"python -m bench.disk --folder FOLDER {options}", save=args.save)


if __name__ == "__main__":
    main()
