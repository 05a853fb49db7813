"""What the Python client raises."""

import re

import grpc


class EchelonError(Exception):
    """A call failed. `code` is the canonical gRPC status name, `message` the server's own words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class InvalidRequestError(EchelonError):
    """The request is wrong and will be so again: the message names the field."""


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
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


_TOO_LARGE = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")  # how grpc says it, before the server sees the request


def error_from_status(code: grpc.StatusCode, details: str | None) -> EchelonError:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(details or "")):
        given, most = sizes.groups()
        message = f"the request has {given} bytes, and this server takes at most {most}; send a shorter prompt"
        return InvalidRequestError(code.name, message)
    return _BY_STATUS.get(code, EchelonError)(code.name, details or "no details")
