"""Echelon's front door: the Python client and the `echelon` command."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echelon.channel import Tls
    from echelon.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Tls", "__version__"]


def __getattr__(name: str) -> object:
    """The clients, loaded when they are asked for: processes that need only `echelon.pb` import no client."""
    if name in ("AsyncClient", "Client"):
        from echelon import client

        return getattr(client, name)
    if name == "Tls":
        from echelon.channel import Tls

        return Tls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
