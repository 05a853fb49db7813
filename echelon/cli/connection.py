"""How commands reach a gateway that asks for TLS or a token.

The environment says it: a token on a command line would stand in the list of processes.
"""

import os
from typing import Any

from echelon.channel import Tls
from echelon.cli.output import UsageProblem
from echelon.client import Client
from echelon.control import ControlClient

ENVIRONMENT_HELP = (
    "Environment: ECHELON_ADDRESS, host:port of the gateway; ECHELON_TOKEN, if it asks for a token; ECHELON_CA_FILE, "
    "the CA of its certificate, if it speaks TLS (ECHELON_TLS=1: a public CA); ECHELON_CLIENT_CERT and "
    "ECHELON_CLIENT_KEY, if it asks for a certificate."
)


def connect(address: str) -> Client:
    return Client(address, **_credentials())


def connect_operator(address: str) -> ControlClient:
    return ControlClient(address, **_credentials())


def _credentials() -> dict[str, Any]:
    token, tls = os.environ.get("ECHELON_TOKEN") or None, _tls()
    try:
        if tls is not None:
            tls.credentials()
    except (OSError, ValueError) as err:
        raise UsageProblem(f"ECHELON_CA_FILE, ECHELON_CLIENT_CERT or ECHELON_CLIENT_KEY: {err}") from err
    return {"token": token, "tls": tls}


def _tls() -> Tls | None:
    files = {
        "ca_file": os.environ.get("ECHELON_CA_FILE") or None,
        "cert_file": os.environ.get("ECHELON_CLIENT_CERT") or None,
        "key_file": os.environ.get("ECHELON_CLIENT_KEY") or None,
    }
    return Tls(**files) if any(files.values()) or os.environ.get("ECHELON_TLS") == "1" else None
