"""What the bytes of a segment file mean.

    one page               header: magic, format version, shape, layout, checksum of all that
    num_blocks entries     [checksum of the rest of the entry, digest, checksum of each part of the block]
    padding to a page
    num_blocks blocks      each padded to whole pages, so that direct I/O can move it

An entry is written after its block. An entry of zeros, or one whose checksum is wrong, is not there. So the entries of
a segment say what it holds, they lie together, and the rest of the file need not be read to find out. Numbers are
little-endian; checksums are xxh3-64, in xxHash's canonical byte order.
"""

import struct
from dataclasses import dataclass

import xxhash

from workers.tiers.files import PAGE_BYTES, page_aligned
from workers.tiers.folder import StoreError

FORMAT_VERSION = 1
DIGEST_BYTES = 16
_MAGIC = b"ECHELKV\0"
_HEADER = struct.Struct("<8sIIQQ16s")  # magic, version, num_parts, block_bytes, num_blocks, layout
_CHECKSUM_BYTES = 8
_SEGMENT_BYTES = 64 << 20
_MIN_BLOCKS = 16  # in a segment
_NUM_SEGMENTS = 8  # at least, as long as that leaves _MIN_BLOCKS in each


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one segment."""

    block_bytes: int
    num_parts: int  # equal parts of a block, each with a checksum
    num_blocks: int

    @property
    def entry_bytes(self) -> int:
        return _CHECKSUM_BYTES * (1 + self.num_parts) + DIGEST_BYTES

    @property
    def head_bytes(self) -> int:
        """Header and entries."""
        return page_aligned(PAGE_BYTES + self.num_blocks * self.entry_bytes)

    @property
    def padded_block_bytes(self) -> int:
        return page_aligned(self.block_bytes)

    def entry_offset(self, slot: int) -> int:
        return PAGE_BYTES + slot * self.entry_bytes

    def block_offset(self, slot: int) -> int:
        return self.head_bytes + slot * self.padded_block_bytes

    @property
    def file_bytes(self) -> int:
        return self.block_offset(self.num_blocks)

    def num_blocks_in(self, file_bytes: int) -> int:
        """How many blocks a file of that size holds wholly."""
        return min(self.num_blocks, max(0, file_bytes - self.head_bytes) // self.padded_block_bytes)


def choose_shape(block_bytes: int, num_parts: int, max_bytes: int) -> Shape:
    """Segments of about 64 MiB, or of less if `max_bytes` is small. Raises StoreError if it is too small."""
    if block_bytes % num_parts:
        raise ValueError(f"blocks of {block_bytes} bytes have no {num_parts} equal parts")
    padded = page_aligned(block_bytes)
    wanted = min(max_bytes // _NUM_SEGMENTS, _SEGMENT_BYTES) // padded
    shape = Shape(block_bytes=block_bytes, num_parts=num_parts, num_blocks=max(_MIN_BLOCKS, wanted))
    needed = 2 * shape.file_bytes
    if max_bytes < needed:
        raise StoreError(
            f"{max_bytes:,} bytes for one rank hold no two segments, which take {needed:,}; "
            f"give {-(-needed // max_bytes)} times as many"
        )
    return shape


def pack_header(shape: Shape, layout: str) -> bytes:
    """One page. `layout` is a layout_digest."""
    fields = (_MAGIC, FORMAT_VERSION, shape.num_parts, shape.block_bytes, shape.num_blocks, bytes.fromhex(layout))
    header = _HEADER.pack(*fields)
    return (header + xxhash.xxh3_64_digest(header)).ljust(PAGE_BYTES, b"\0")


def parse_header(page: memoryview, *, block_bytes: int, num_parts: int, layout: str) -> Shape | None:
    """None: damaged, or of another layout."""
    if len(page) < PAGE_BYTES:
        return None
    *_, num_blocks, _ = _HEADER.unpack_from(page)
    shape = Shape(block_bytes=block_bytes, num_parts=num_parts, num_blocks=num_blocks)
    return shape if page == pack_header(shape, layout) else None


def pack_entry(digest: bytes, block: memoryview, num_parts: int) -> bytes:
    body = digest + _part_checksums(block, num_parts)
    return xxhash.xxh3_64_digest(body) + body


def digest_of(entry: bytes) -> bytes | None:
    """None: the entry is empty or damaged."""
    body = entry[_CHECKSUM_BYTES:]
    if entry[:_CHECKSUM_BYTES] != xxhash.xxh3_64_digest(body):
        return None
    return body[:DIGEST_BYTES]


def agrees(entry: bytes, block: memoryview, num_parts: int) -> bool:
    """Whether these are the bytes of which the entry was made."""
    return entry[_CHECKSUM_BYTES + DIGEST_BYTES :] == _part_checksums(block, num_parts)


def _part_checksums(block: memoryview, num_parts: int) -> bytes:
    part_bytes = len(block) // num_parts
    starts = range(0, len(block), part_bytes)
    return b"".join(xxhash.xxh3_64_digest(block[start : start + part_bytes]) for start in starts)
