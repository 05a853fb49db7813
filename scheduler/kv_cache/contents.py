"""Which blocks a cache holds, in whatever tier, told to those who watch it as what changes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from childproc.block_digests import Digest, short_digest

_AT_ONCE = 8192  # changes in one report: 64 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Digests are short ones."""

    from_nothing: bool  # what was told before counts no more
    added: list[int]
    removed: list[int]


class CacheWatch:
    """What one watcher has not been told yet. It never grows beyond the blocks that are there and those that the
    watcher believes to be there, however slowly it reads."""

    def __init__(self, known: Iterable[int]) -> None:
        self._from_nothing = True
        self._pending = dict.fromkeys(known, True)  # by digest: whether it was added, or removed

    @property
    def has_changes(self) -> bool:
        return self._from_nothing or bool(self._pending)

    def note(self, digest: int, *, is_added: bool) -> None:
        if self._pending.get(digest, is_added) is is_added:
            self._pending[digest] = is_added
        else:
            del self._pending[digest]  # came and went, or went and came back

    def take(self) -> Changes:
        """The next of them, oldest first; few enough for one message."""
        changes = Changes(from_nothing=self._from_nothing, added=[], removed=[])
        self._from_nothing = False
        for digest in list(islice(self._pending, _AT_ONCE)):
            (changes.added if self._pending.pop(digest) else changes.removed).append(digest)
        return changes


class CacheContents:
    """Blocks of one engine, each counted once for every tier that holds it."""

    def __init__(self) -> None:
        self._num_tiers: Counter[int] = Counter()
        self._watches: list[CacheWatch] = []

    def add(self, digest: Digest) -> None:
        """A tier holds the block from now on."""
        short = short_digest(digest)
        self._num_tiers[short] += 1
        if self._num_tiers[short] == 1:
            self._tell(short, is_added=True)

    def remove(self, digest: Digest) -> None:
        """A tier that held the block holds it no more."""
        short = short_digest(digest)
        self._num_tiers[short] -= 1
        if self._num_tiers[short] == 0:
            del self._num_tiers[short]
            self._tell(short, is_added=False)

    def watch(self) -> CacheWatch:
        """Everything that is there counts as added. `unwatch` ends it."""
        watch = CacheWatch(self._num_tiers)
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: CacheWatch) -> None:
        """Does nothing for those of others."""
        self._watches = [other for other in self._watches if other is not watch]

    def _tell(self, digest: int, *, is_added: bool) -> None:
        for watch in self._watches:
            watch.note(digest, is_added=is_added)
