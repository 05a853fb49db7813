"""How a request is turned down with a status of its own."""

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
    """The refusal of a request that is wrong whatever the state of the server."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
