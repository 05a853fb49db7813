"""A server's certificate and key, for the process that plans with them and the one that serves with them."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from echelon.pb.process_pb2 import TlsSection


class TlsFileError(ValueError):
    """A file cannot be used; the message begins with its key in the deployment file."""


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What the files said at one moment, in PEM. Without `client_ca`, clients need no certificate."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext  # the same for Python's own sockets

    @classmethod
    def read(cls, section: TlsSection) -> Self:
        """Raises TlsFileError."""
        cert, key = _read("cert", section.cert), _read("key", section.key)
        client_ca = _read("client_ca", section.client_ca) if section.client_ca else None
        return cls(cert, key, client_ca, _context(section))


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as err:
        raise TlsFileError(f"{key}: {path} cannot be read ({err.strerror})") from err


def _context(section: TlsSection) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(section.cert, section.key, password=_no_password)
    except (ssl.SSLError, ValueError) as err:
        raise TlsFileError(
            f"cert: {section.cert} and key {section.key} are no pair of a certificate and its unencrypted key in PEM "
            f"({_reason(err)})"
        ) from err
    if section.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(section.client_ca)
        except ssl.SSLError as err:
            message = f"client_ca: {section.client_ca} holds no certificates in PEM ({_reason(err)})"
            raise TlsFileError(message) from err
    return context


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise ValueError("the key is encrypted")


def _reason(err: Exception) -> str:
    return getattr(err, "reason", None) or str(err)
