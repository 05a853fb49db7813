"""Addresses to listen on, and error messages for when that fails."""

import errno


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind_problem(host: str, port: int, err: OSError, *, key: str) -> str:
    """For a person: why nobody can listen there, and which key of the deployment file to change."""
    address = join(host, port)
    if err.errno == errno.EADDRINUSE:
        return f"{address} is taken: stop the process that listens there, or change {key}"
    return f"cannot listen on {address} ({err.strerror or err}); change server.host or {key}"
