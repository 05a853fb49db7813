"""The CA of one deployment. Whoever has none of its certificates reaches no scheduler and no worker."""

import datetime
import os
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from childproc.wires import INSIDE_NAME
from cluster.errors import StartError
from echelon.pb.process_pb2 import ProcessIdentity

_VALID = datetime.timedelta(days=3650)  # the deployment ends before
_CLOCKS_DIFFER = datetime.timedelta(days=1)  # between nodes, at most


class Authority:
    """Made when a deployment starts; `data` is for the next controller, should this one be lost."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, deployment: str) -> Self:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"echelon {deployment}")
        usage = x509.BasicConstraints(ca=True, path_length=0)
        builder = _builder(name, name, key.public_key()).add_extension(usage, critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises StartError."""
        try:
            data = path.read_bytes()
            key = serialization.load_pem_private_key(data, password=None)
            assert isinstance(key, ec.EllipticCurvePrivateKey), "we have written it"
            return cls(x509.load_pem_x509_certificate(data), key)
        except (OSError, ValueError) as err:
            raise StartError(f"{path} cannot be read: {err}; run echelon down and up") from err

    def save(self, path: Path) -> None:
        """Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(_key_pem(self._key) + _pem(self._certificate))
            stream.flush()
            os.fsync(stream.fileno())

    def issue(self, process: str) -> ProcessIdentity:
        """A key and a certificate for one process, with which it both serves and calls."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(INSIDE_NAME)])
        builder = _builder(_name(process), self._certificate.subject, key.public_key())
        certificate = builder.add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        return ProcessIdentity(ca=_pem(self._certificate), certificate=_pem(certificate), key=_key_pem(key))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _VALID)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
