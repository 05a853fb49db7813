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

import xxhash

from childproc.segment_shape import CHECKSUM_BYTES, DIGEST_BYTES, PAGE_BYTES, Shape

FORMAT_VERSION = 1
_MAGIC = b"ECHELKV\0"
_HEADER = struct.Struct("<8sIIQQ16s")  # magic, version, num_parts, block_bytes, num_blocks, layout


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
    body = entry[CHECKSUM_BYTES:]
    if entry[:CHECKSUM_BYTES] != xxhash.xxh3_64_digest(body):
        return None
    return body[:DIGEST_BYTES]


def agrees(entry: bytes, block: memoryview, num_parts: int) -> bool:
    """Whether these are the bytes of which the entry was made."""
    return entry[CHECKSUM_BYTES + DIGEST_BYTES :] == _part_checksums(block, num_parts)


def _part_checksums(block: memoryview, num_parts: int) -> bytes:
    part_bytes = len(block) // num_parts
    starts = range(0, len(block), part_bytes)
    return b"".join(xxhash.xxh3_64_digest(block[start : start + part_bytes]) for start in starts)
