"""The label of an output that is not exact, for `usage` of every HTTP API."""

from typing import Any

from echelon.pb.inference_pb2 import Usage


def approximations(usage: Usage) -> dict[str, Any]:
    """The field, which none of these APIs has, only if there is something to say."""
    return {"approximations": list(usage.approximations)} if usage.approximations else {}
