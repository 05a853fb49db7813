"""Which blocks every rank has on disk, and whether the disk behaves."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from childproc.block_digests import Digest
from scheduler.kv_cache.contents import CacheContents

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """When a disk that misbehaves is left alone."""

    most_errors: int = 3  # in a row, after which it is left alone; not measured
    first_pause_s: float = 30.0  # for so long, then for twice as long each time; not measured
    longest_pause_s: float = 600.0  # the doubling ends here; not measured


_TUNING = Tuning()


class Attempts:
    """Moves of one kind, and whether to go on with them. After several errors in a row they stop for a while. Then the
    next one is a trial: if it fails, the pause doubles."""

    def __init__(self) -> None:
        self.paused_until_s = -inf
        self._errors_in_row = 0
        self._pause_s = _TUNING.first_pause_s

    @property
    def are_failing(self) -> bool:
        return self._errors_in_row >= _TUNING.most_errors

    def worked(self) -> None:
        self._errors_in_row = 0
        self._pause_s = _TUNING.first_pause_s
        self.paused_until_s = -inf

    def failed(self, now: float) -> None:
        self._errors_in_row += 1
        if self.are_failing and now >= self.paused_until_s:  # not for each of the moves sent before the pause
            self.paused_until_s = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _TUNING.longest_pause_s)


class DiskTier:
    """What is on disk, and how recent reads and writes have gone. A full disk can still be read."""

    def __init__(self, num_blocks: int, contents: CacheContents) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self.last_error = ""
        self.reads = Attempts()
        self.writes = Attempts()
        self._contents = contents
        self._digests: set[Digest] = set()
        self._is_listed = False  # the ranks have said what they hold
        self._awaits_list = num_blocks > 0
        self.list_due_s = inf  # when seqs wait for that no longer

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._digests

    def announce(self, digests: Iterable[Digest], *, is_last: bool) -> None:
        """Part of what the ranks hold."""
        for digest in digests:
            self.add(digest)
        if is_last:
            self._is_listed = True
            self._end_wait()

    def expects_list(self, now: float, timeout_s: float) -> bool:
        """Whether a seq had better wait until the ranks have said what they hold, as they do when they have started.
        A disk that hangs then is waited for once, for `timeout_s` after the first seq asked."""
        if self._awaits_list:
            self.list_due_s = min(self.list_due_s, now + timeout_s)
        return self._awaits_list

    def expire(self, now: float) -> None:
        """Let seqs go on for which the list has not come in time."""
        if now >= self.list_due_s:
            self._end_wait()

    def _end_wait(self) -> None:
        self._awaits_list, self.list_due_s = False, inf

    def add(self, digest: Digest) -> None:
        if digest not in self._digests:
            self._digests.add(digest)
            self._contents.add(digest)

    def discard(self, digest: Digest) -> None:
        if digest in self._digests:
            self._digests.remove(digest)
            self._contents.remove(digest)

    def evict(self, digest: Digest) -> None:
        """The ranks have made room."""
        self.num_evictions += digest in self._digests
        self.discard(digest)

    def may(self, attempts: Attempts, now: float) -> bool:
        """Whether to read or write, which is one of `reads` and `writes`."""
        return self._is_listed and self.num_blocks > 0 and now >= attempts.paused_until_s

    @property
    def is_failing(self) -> bool:
        return self.reads.are_failing or self.writes.are_failing

    def failed(self, attempts: Attempts, error: str, now: float) -> None:
        """A move had an error or took too long."""
        self.last_error = error
        was_failing = attempts.are_failing
        attempts.failed(now)
        if attempts.are_failing and not was_failing:
            what = "reads" if attempts is self.reads else "writes"
            logger.warning("kv_cache.disk: %s have failed %d times in a row: %s", what, _TUNING.most_errors, error)
