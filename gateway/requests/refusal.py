"""A refused request and its gRPC status."""

from collections.abc import Sequence

import grpc

_MAX_MESSAGE_BYTES = 2000  # three times as many in a trailer, at most; grpc refuses trailers beyond 8 KiB
_MAX_SHOWN_CHARS = 100
READ_LESS = "send a shorter one, or token_ids, which are read as they are"  # after what was given up


class Refusal(Exception):
    """A request that cannot be served. `message` is for the client: it names the field, the value and the remedy."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        self.message = _shortened(message)
        super().__init__(self.message)


Words = Sequence[tuple[str, str]]  # how messages begin, and how they begin in a client's words


def reworded(refusal: Refusal, words: Words, number: int = 0) -> Refusal:
    """The same about a client's own field; {} in its name stands for `number`."""
    for ours, theirs in words:
        if refusal.message.startswith(ours):
            return Refusal(refusal.code, theirs.format(number) + refusal.message[len(ours) :])
    return refusal


def shown(text: str) -> str:
    """A client's own words in a message to it."""
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "...")


def _shortened(message: str) -> str:
    data = message.encode(errors="replace")
    return message if len(data) <= _MAX_MESSAGE_BYTES else data[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_code(number: int) -> grpc.StatusCode:
    """The canonical code of a number on the wire."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)


def invalid(message: str) -> Refusal:
    """Refuses a request that no state of the server could make valid."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
