"""Certificate and key of a gateway, from files that may be replaced while it serves."""

import logging
from pathlib import Path

from childproc.file_stamp import FileStamp
from childproc.tls_identity import TlsFileError, TlsIdentity
from echelon.pb.process_pb2 import TlsSection

logger = logging.getLogger(__name__)


class TlsFiles:
    """Files that a gateway was given. Raises TlsFileError."""

    def __init__(self, section: TlsSection) -> None:
        self._section = section
        self._stamps = self._stamp()
        self._identity = TlsIdentity.read(section)

    def identity(self) -> TlsIdentity:
        """The newest; the same object while the files stay. What cannot be used is logged, and the old one stays."""
        stamps = self._stamp()
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._identity = TlsIdentity.read(self._section)
                logger.info("read %s again", self._section.cert)
            except TlsFileError as err:
                logger.error("the certificate stays as it was: server.tls.%s", err)
        return self._identity

    def _stamp(self) -> tuple[FileStamp, ...]:
        section = self._section
        return tuple(FileStamp.of(Path(path)) for path in (section.cert, section.key, section.client_ca))
