"""Who sends a request, and how much of the service they may take."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from childproc.tokens_file import Scope
from echelon.pb.access_pb2 import TokenRecord
from gateway.requests.refusal import Refusal


class Caller:
    """The holder of a token. `record` may be replaced while requests run; `clock` is monotonic, seconds."""

    def __init__(self, record: TokenRecord, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.record = record
        self._clock = clock
        self._num_running = 0
        self._num_spent = 0.0  # requests of the last minute, as a bucket that drains evenly
        self._spent_at_s = clock()

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def sees(self) -> str | None:
        """Whose jobs and files the caller sees: its own; operators see everybody's, None."""
        return None if self.may(Scope.ADMIN) else self.name

    def may(self, scope: Scope) -> bool:
        return scope in self.record.scopes

    @contextmanager
    def running(self) -> Iterator[None]:
        """While one request runs. Raises Refusal beyond the caller's limits."""
        self._check_running()
        self._spend()
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def salt(self, wanted: str) -> str:
        """The `cache_salt` of a request that asks for `wanted`: callers with a salt of their own share with nobody."""
        if not self.record.cache_salt:
            return wanted
        return hashlib.sha256(f"{self.record.cache_salt}\0{wanted}".encode()).hexdigest()

    def _check_running(self) -> None:
        most = self.record.max_running_requests
        if most and self._num_running >= most:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"token {self.name!r} has {self._num_running} requests running, and at most {most} may; "
                "try again when one has ended",
            )

    def _spend(self) -> None:
        most = self.record.max_requests_per_minute
        now = self._clock()
        self._num_spent = max(0.0, self._num_spent - (now - self._spent_at_s) * most / 60)
        self._spent_at_s = now
        if most and self._num_spent + 1 > most:
            wait_s = (self._num_spent + 1 - most) * 60 / most
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"token {self.name!r} may send {most} requests a minute; try again in {wait_s:.1f} s",
            )
        self._num_spent += 1


def everyone() -> Caller:
    """Whoever calls a gateway that asks for no tokens."""
    return Caller(TokenRecord(scopes=list(Scope)))
