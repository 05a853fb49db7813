"""Chained digests of token blocks: equal digests mean that all tokens up to the end of the block are equal.

Schedulers find cached prefixes by them, and a gateway finds the replica that has one.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

Digest = bytes  # 128 bits: no two different prefixes are ever taken for each other


def root_digest(model_name: str, block_size: int, salt: str = "") -> Digest:
    """The start of a chain. It differs between models, layouts and salts, so the KV of another is never found."""
    return blake2b(f"{model_name}\0{block_size}\0{salt}".encode(), digest_size=16).digest()


def short_digest(digest: Digest) -> int:
    """64 bits of it, for guesses that may be wrong once in a lifetime."""
    return int.from_bytes(digest[:8], "little")


class DigestChain:
    """The digests of a seq's full blocks, extended as its history grows; each block is hashed once."""

    __slots__ = ("_block_size", "_root", "digests")

    def __init__(self, root: Digest, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self.digests: list[Digest] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> list[Digest]:
        """Digests of at least the first `num_blocks` blocks of `token_ids`."""
        size = self._block_size
        for i in range(len(self.digests), num_blocks):
            parent = self.digests[-1] if self.digests else self._root
            tokens = array("I", token_ids[i * size : (i + 1) * size])
            self.digests.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return self.digests
