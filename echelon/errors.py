"""What the Python client raises."""

import re
from typing import cast
from urllib.parse import unquote

import grpc


class EchelonError(Exception):
    """A call failed. `code` is the canonical gRPC status name, `message` the server's own words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class InvalidRequestError(EchelonError):
    """The request is wrong and will be so again: the message names the field."""


class AuthenticationError(EchelonError):
    """The gateway asks for a token, or does not know this one."""


class PermissionDeniedError(EchelonError):
    """The token does not allow this call."""


class NotFoundError(EchelonError):
    """The model is not served here."""


class OverloadedError(EchelonError):
    """The queue is full. Worth another try later."""


class UnavailableError(EchelonError):
    """Nobody answers, or no replica is ready. Worth another try later."""


class DeadlineExceededError(EchelonError):
    """timeout_s was over before the last token."""


class CancelledError(EchelonError):
    """The call was cancelled."""


_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


_TOO_LARGE = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")  # how grpc says it, before the server sees the request


_CA_HOW = "ECHELON_CA_FILE for commands, `tls` for a Client"
_REMEDY = "start one with `echelon up`, or give the address that `echelon status` shows"
# How grpc says that it found nobody: with the address that it tried, and the reason.
_NOBODY = re.compile(r"(?:failed to connect to all addresses|errors resolving)(?:.* ipv[46]:(\S+):\s)?.*: ([^:\]]+)")


def error_from_call(err: grpc.RpcError, address: str) -> EchelonError:
    """What a call to the gateway at `address` has ended with."""
    call = cast(grpc.Call, err)  # which grpc's errors are at the same time, and their base class does not say
    return _error_from_status(call.code(), call.details() or "no details", address)


def _error_from_status(code: grpc.StatusCode, details: str, address: str) -> EchelonError:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(details)):
        given, most = sizes.groups()
        message = f"the request has {given} bytes, and this server takes at most {most}; send a shorter prompt"
        return InvalidRequestError(code.name, message)
    if code is grpc.StatusCode.UNAVAILABLE and (nobody := _NOBODY.match(details)):
        reason = _reason(address, *nobody.groups())
        details = f"no deployment answers at {address} ({reason}); {_remedy_of(reason)}"
    return _BY_STATUS.get(code, EchelonError)(code.name, details)


def _remedy_of(reason: str) -> str:
    """TLS fails in words of its own."""
    if "socket closed" in reason.lower():
        return f"if it speaks TLS, give its CA ({_CA_HOW}); otherwise {_REMEDY}"
    if re.search(r"ssl|tls|certificate|handshake|hostname verification", reason, re.IGNORECASE):
        return f"give the CA of its certificate ({_CA_HOW}), and an address that the certificate names"
    return _REMEDY


def _reason(address: str, tried: str | None, reason: str) -> str:
    """A proxy or a default port may be why another address was tried."""
    tried = unquote(tried or address)
    return reason if tried == address else f"{tried}: {reason}"
