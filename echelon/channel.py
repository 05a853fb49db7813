"""How a client's channel to a gateway is set up."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

ChannelOptions = tuple[tuple[str, int], ...]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What a client needs to speak TLS; all files are PEM.

    Without `ca_file`, the gateway's certificate is verified by the CAs that grpc brings. `cert_file` and `key_file` are
    the client's own, for a gateway that asks for them.
    """

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read, ValueError for a certificate without its key."""
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("tls: cert_file and key_file belong together; give both or neither")
        return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.cert_file))


def open_channel(address: str, tls: Tls | None, *options: tuple[str, int]) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=channel_options(address, *options))
    return grpc.secure_channel(address, tls.credentials(), options=channel_options(address, *options))


def open_async_channel(address: str, tls: Tls | None, *options: tuple[str, int]) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=channel_options(address, *options))
    return grpc.aio.secure_channel(address, tls.credentials(), options=channel_options(address, *options))


def metadata(token: str | None) -> Metadata:
    """What goes with every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def channel_options(address: str, *options: tuple[str, int]) -> ChannelOptions:
    """`options`, and no proxy to this machine itself: http_proxy and the like are for other machines."""
    return (*options, ("grpc.enable_http_proxy", 0)) if _is_here(address) else options


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def _is_here(address: str) -> bool:
    """Whether host:port, or one of grpc's own forms such as dns:///host:port, is on the loopback interface."""
    host = address.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("dns:")
    host = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() in ("localhost", "localhost.")
    return number.is_loopback or number.is_unspecified
