"""The tokens of a gateway, from a file that may change while it serves."""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from childproc.file_stamp import FileStamp
from childproc.tokens_file import Scope, TokensFileError, read_tokens_file
from echelon.pb.access_pb2 import TokensFile
from gateway.access.audit import AuditLog
from gateway.access.caller import Caller, everyone
from gateway.requests.refusal import Refusal

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 1.0
_HOW = "send it as `authorization: Bearer TOKEN`"


class Tokens:
    """Knows callers by their tokens; without a file, everyone may do everything. Raises TokensFileError."""

    def __init__(
        self, path: Path | None, audit: AuditLog | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._audit = audit or AuditLog(None, "")
        self._clock = clock
        self._everyone = everyone()
        self._callers: dict[str, Caller] = {}  # by the SHA-256 of the token
        self._stamp = FileStamp() if path is None else FileStamp.of(path)
        self._looked_at_s = clock()
        if path is not None:
            self._take(read_tokens_file(path))

    def caller(self, authorization: str | None, scope: Scope) -> Caller:
        """Raises Refusal: UNAUTHENTICATED without a token that is known, PERMISSION_DENIED without the scope."""
        if self._path is None:
            return self._everyone
        self._look_again(self._path)
        caller = self._callers.get(_digest(_token_of(authorization)))
        if caller is not None and caller.may(scope):
            return caller
        refusal = _refusal(authorization, caller, scope)
        self._audit.call_refused(refusal.code, "" if caller is None else caller.name, scope.value)
        raise refusal

    def _look_again(self, path: Path) -> None:
        now = self._clock()
        if now - self._looked_at_s < _LOOK_AGAIN_S:
            return
        self._looked_at_s = now
        stamp = FileStamp.of(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_tokens_file(path))
        except TokensFileError as err:
            logger.error("the tokens stay as they were: %s", err)
        else:
            logger.info("read %s again: %d tokens", path, len(self._callers))

    def _take(self, file: TokensFile) -> None:
        """Callers that stay keep what they have running and spent."""
        callers = {record.sha256: self._callers.get(record.sha256) for record in file.tokens}
        for record in file.tokens:
            caller = callers[record.sha256] or Caller(record, clock=self._clock)
            caller.record = record
            callers[record.sha256] = caller
        self._callers = {digest: caller for digest, caller in callers.items() if caller is not None}


def _refusal(authorization: str | None, caller: Caller | None, scope: Scope) -> Refusal:
    if caller is not None:
        message = f"token {caller.name!r} has no scope {scope.value!r}; ask an operator for one that has"
        return Refusal(grpc.StatusCode.PERMISSION_DENIED, message)
    what = "this token is not known here" if _token_of(authorization) else "this service asks for a token"
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, f"{what}; {_HOW}")


def _token_of(authorization: str | None) -> str:
    """Empty: there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _digest(token: str) -> str:
    """A look-up by digest tells nothing of a token by the time it takes: who chooses a token cannot choose its digest,
    and a token has 256 random bits, so no slower hash is needed."""
    return hashlib.sha256(token.encode()).hexdigest()
