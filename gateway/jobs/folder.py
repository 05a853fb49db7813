"""The folder of a deployment's jobs: the store, the files that were uploaded, and the lock of whoever owns it.

jobs.sqlite   files, jobs, items and results
files/ID      content that was uploaded
uploads/      content that is still arriving; what a lost process left there goes when the next one opens the folder
lock
"""

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Container
from pathlib import Path

from gateway.jobs.records import FileRecord, Purpose


class JobsFolder:
    """`take` it before anything else. Methods block: call them from a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store_path = path / "jobs.sqlite"
        self._files = path / "files"
        self._uploads = path / "uploads"
        self._lock: int | None = None

    def take(self) -> bool:
        """Whether this process owns the folder from now on; False while another does. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        shutil.rmtree(self._uploads, ignore_errors=True)
        for folder in (self._files, self._uploads):
            folder.mkdir(exist_ok=True, mode=0o700)
        return True

    def release(self) -> None:
        """Another process may own it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def upload(self) -> "Upload":
        """For content that arrives. Raises OSError."""
        return Upload(self._uploads / secrets.token_hex(12), self._files)

    def read(self, file_id: str, start: int, num_bytes: int) -> bytes:
        """A part of an uploaded file, shorter at its end. Raises OSError."""
        with (self._files / file_id).open("rb") as stream:
            stream.seek(start)
            return stream.read(num_bytes)

    def keep_only(self, file_ids: Container[str]) -> None:
        """Removes the content of files that never came into the store, because their process was lost before."""
        for path in self._files.iterdir():
            if path.name not in file_ids:
                path.unlink()

    def remove(self, file_id: str) -> None:
        (self._files / file_id).unlink(missing_ok=True)


class Upload:
    """Content in the making. `finish` or `discard` ends it."""

    def __init__(self, path: Path, files: Path) -> None:
        self.num_bytes = 0
        self._path = path
        self._files = files
        self._stream = path.open("xb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def finish(self, owner: str, name: str, created_at: int) -> FileRecord:
        """The file, which survives a loss of power from now on. It is nowhere in the store yet."""
        file_id = f"file-{secrets.token_hex(12)}"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._path.rename(self._files / file_id)
        _sync_folder(self._files)
        return FileRecord(
            id=file_id,
            owner=owner,
            purpose=Purpose.BATCH,
            name=name,
            num_bytes=self.num_bytes,
            created_at=created_at,
            sha256=self._digest.hexdigest(),
        )

    def discard(self) -> None:
        """Nothing after `finish`."""
        self._stream.close()
        self._path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
