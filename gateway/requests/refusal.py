"""A refused request and its gRPC status."""

import grpc


class Refusal(Exception):
    """A request that cannot be served. `message` is for the client: it names the field, the value and the remedy."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_code(number: int) -> grpc.StatusCode:
    """The canonical code of a number on the wire."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)


def invalid(message: str) -> Refusal:
    """Refuses a request that no state of the server could make valid."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
