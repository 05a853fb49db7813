"""How many KV blocks fit on disk: the shape of segment files, for those that plan them and those that write them."""

from dataclasses import dataclass

PAGE_BYTES = 4096  # what offsets, lengths and addresses of direct I/O are multiples of
DIGEST_BYTES = 16
CHECKSUM_BYTES = 8
_SEGMENT_BYTES = 64 << 20
_MIN_BLOCKS = 16  # in a segment
_NUM_SEGMENTS = 8  # at least, as long as that leaves _MIN_BLOCKS in each


class TooFewBytesError(ValueError):
    """No two segments fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one segment."""

    block_bytes: int
    num_parts: int  # equal parts of a block, each with a checksum
    num_blocks: int

    @property
    def entry_bytes(self) -> int:
        return CHECKSUM_BYTES * (1 + self.num_parts) + DIGEST_BYTES

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

    def capacity(self, max_bytes: int) -> int:
        """Blocks in whole segments."""
        return max_bytes // self.file_bytes * self.num_blocks


def choose_shape(block_bytes: int, num_parts: int, max_bytes: int) -> Shape:
    """Whole segments that nearly fill `max_bytes`: of about 64 MiB, or of less if these are few. Raises
    TooFewBytesError."""
    if block_bytes % num_parts:
        raise ValueError(f"blocks of {block_bytes} bytes have no {num_parts} equal parts")
    smallest = _smallest(block_bytes, num_parts)
    if max_bytes < (least := least_bytes(block_bytes, num_parts)):
        raise TooFewBytesError(f"{max_bytes:,} bytes for one rank hold no two segments of blocks, which take {least:,}")
    wanted = max(_NUM_SEGMENTS, -(-max_bytes // _SEGMENT_BYTES))
    segment_bytes = max_bytes // min(wanted, max_bytes // smallest.file_bytes)
    room = segment_bytes - 2 * PAGE_BYTES  # header, and padding of the entries
    num_blocks = max(_MIN_BLOCKS, room // (smallest.entry_bytes + smallest.padded_block_bytes))
    return Shape(block_bytes=block_bytes, num_parts=num_parts, num_blocks=num_blocks)


def least_bytes(block_bytes: int, num_parts: int) -> int:
    """Of two segments."""
    return 2 * _smallest(block_bytes, num_parts).file_bytes


def _smallest(block_bytes: int, num_parts: int) -> Shape:
    return Shape(block_bytes=block_bytes, num_parts=num_parts, num_blocks=_MIN_BLOCKS)


def page_aligned(num_bytes: int) -> int:
    """The next multiple of PAGE_BYTES."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
