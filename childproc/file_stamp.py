"""Whether a file has changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Differs when a file was written or replaced; all zero where there is none."""

    inode: int = 0
    mtime_ns: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, path: Path) -> Self:
        try:
            found = path.stat()  # follows links, as Kubernetes mounts secrets
        except OSError:
            return cls()
        return cls(found.st_ino, found.st_mtime_ns, found.st_size)
