"""Who has asked for what, and what became of it, a JSON object a line. Never what a prompt or an output says."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from echelon.pb.inference_pb2 import FinishReason, GenerateComplete
from echelon.pb.scheduler_pb2 import Submit

logger = logging.getLogger(__name__)

_MOST_REFUSALS_PER_S = 10  # callers without a token must not fill the disk; the rest is counted


class AuditFileError(ValueError):
    """The file cannot be written; the message says why."""


class AuditLog:
    """Appends to a file; several gateways of a node may share it. Raises AuditFileError. `now`: seconds since 1970."""

    def __init__(self, path: Path | None, gateway: str, *, now: Callable[[], float] = time.time) -> None:
        """`path`: None: nothing is written."""
        self._path = path
        self._gateway = gateway
        self._now = now
        self._second, self._num_refused = 0, 0  # this second, and refusals in it
        self._num_dropped = 0  # that are not told yet
        self._is_broken = False
        if path is not None:
            try:
                _append(path, b"")
            except OSError as err:
                raise AuditFileError(f"{path} cannot be written: {err.strerror}") from err

    def request_ended(
        self, submit: Submit, code: grpc.StatusCode, elapsed_s: float, complete: GenerateComplete | None
    ) -> None:
        """`complete`: how it ended, unless with an error."""
        facts: dict[str, Any] = {
            "token": submit.tenant,
            "request_id": submit.request_id,
            "status": code.name,
            "prompt_tokens": len(submit.prompt_token_ids),
            "elapsed_s": round(elapsed_s, 3),
        }
        if complete is not None:
            facts["completion_tokens"] = complete.usage.completion_tokens
            facts["finish_reasons"] = [_reason(finished.reason) for finished in complete.finished]
        self._write("request", facts)

    def call_refused(self, code: grpc.StatusCode, token: str, scope: str) -> None:
        """`token`: the name of a known one, or empty; `scope`: what the call needs."""
        second = int(self._now())
        if second != self._second:
            self._second, self._num_refused = second, 0
        self._num_refused += 1
        if self._num_refused > _MOST_REFUSALS_PER_S:
            self._num_dropped += 1
            return
        facts: dict[str, Any] = {"token": token, "status": code.name, "needed_scope": scope}
        if self._num_dropped:
            facts["refusals_not_shown"], self._num_dropped = self._num_dropped, 0
        self._write("refusal", facts)

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        if self._path is None:
            return
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now()))
        line = json.dumps({"at": at, "gateway": self._gateway, "event": event, **facts}) + "\n"
        try:
            _append(self._path, line.encode())
        except OSError as err:  # requests go on: an audit log is no reason to serve nobody
            if not self._is_broken:
                logger.error("the audit log %s cannot be written: %s", self._path, err)
            self._is_broken = True
        else:
            self._is_broken = False


def _append(path: Path, data: bytes) -> None:
    """Opened each time, which takes some 20 us, so that a file can be moved away at any time."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _reason(reason: "FinishReason.ValueType") -> str:
    return FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
