"""Which blocks every rank has on disk, and whether the disk behaves."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from scheduler.requests.digests import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """When a disk that misbehaves is left alone."""

    most_errors: int = 3  # in a row; not measured
    first_pause_s: float = 30.0  # then doubled each time; not measured
    longest_pause_s: float = 600.0  # not measured


_TUNING = Tuning()


class DiskTier:
    """What is on disk, and the errors of late. After several errors in a row nothing is read or written for a while.
    Then the next move is a trial: if it fails, the pause doubles."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_errors = 0
        self.num_evictions = 0
        self.last_error = ""
        self._digests: set[Digest] = set()
        self._is_listed = False  # the ranks have said what they hold
        self._errors_in_row = 0
        self._pause_s = _TUNING.first_pause_s
        self._paused_until_s = -inf

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._digests

    def announce(self, digests: Iterable[Digest], *, is_last: bool) -> None:
        """Part of what the ranks hold."""
        self._digests.update(digests)
        self._is_listed = self._is_listed or is_last

    def add(self, digest: Digest) -> None:
        self._digests.add(digest)

    def discard(self, digest: Digest) -> None:
        self._digests.discard(digest)

    def evict(self, digest: Digest) -> None:
        """The ranks have made room."""
        self.num_evictions += digest in self._digests
        self._digests.discard(digest)

    def may_work(self, now: float) -> bool:
        return self._is_listed and self.num_blocks > 0 and now >= self._paused_until_s

    @property
    def is_failing(self) -> bool:
        return self._errors_in_row >= _TUNING.most_errors

    def worked(self) -> None:
        self._errors_in_row = 0
        self._pause_s = _TUNING.first_pause_s

    def failed(self, error: str, now: float) -> None:
        """A move had an error or took too long."""
        self.num_errors += 1
        self.last_error = error
        self._errors_in_row += 1
        if self.is_failing and now >= self._paused_until_s:  # not for each of the moves that were sent before the pause
            self._paused_until_s = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _TUNING.longest_pause_s)
