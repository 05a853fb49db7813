"""What a child process is told: one line of JSON on standard input."""

import json
from typing import BinaryIO, TypeVar

from google.protobuf import json_format

from echelon import __version__
from echelon.pb.process_pb2 import GatewaySpec, SchedulerSpec, WorkerSpec

S = TypeVar("S", GatewaySpec, SchedulerSpec, WorkerSpec)


class SpecError(ValueError):
    """The process cannot be started with this spec."""


def read_spec(stdin: BinaryIO, kind: type[S]) -> S:
    """Reads one line.

    The version is compared first: the spec of another version may well have other fields.

    Raises:
        SpecError: The line holds no such spec, or that of another version of Echelon.
    """
    line = stdin.readline()
    expected = f"standard input must start with a {kind.__name__} as one line of JSON"
    try:
        fields = json.loads(line)
    except ValueError as err:
        raise SpecError(f"{expected}: {err}") from err
    if not isinstance(fields, dict):
        raise SpecError(f"{expected}: it holds no object")
    version = fields.get("version")
    if version != __version__:
        raise SpecError(
            f"version: the controller runs Echelon {version or '(no version)'}, this process {__version__}; "
            "install one version everywhere"
        )
    try:
        return json_format.ParseDict(fields, kind())
    except json_format.ParseError as err:
        raise SpecError(f"{expected}: {err}") from err
