"""The logs of a deployment's processes on this machine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import StartError
from cluster.state_dir import folder_of, names

_POLL_S = 0.3
_TAIL_BYTES = 1 << 20  # that are read from the end of a file to find its last lines


@dataclass(frozen=True, slots=True)
class LogLine:
    log: str  # name of the file without .log: the process, and how often it was started if that is more than once
    text: str


@dataclass(slots=True)
class _Log:
    """One file, read as far as it has grown."""

    path: Path
    offset: int = 0
    rest: bytes = b""  # the beginning of a line
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.path.name.removesuffix(".log")

    def read(self) -> list[LogLine]:
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read()
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [LogLine(self.name, line.decode(errors="replace")) for line in lines]

    def last(self, num_lines: int) -> list[LogLine]:
        """The last lines of what is there."""
        size = self.path.stat().st_size
        self.offset = max(0, size - _TAIL_BYTES)
        lines = self.read()
        return lines[-num_lines:] if num_lines else []


def read_logs(
    deployment: str,
    process: str | None,
    *,
    num_lines: int,
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[LogLine]:
    """The last lines of each log of a process, or of all processes; then, with `follow`, what is added: until the
    deployment is taken down if it was started here, for ever otherwise.

    Raises StartError if there is no such log.
    """
    logs = {path: _Log(path) for path in _paths(deployment, process)}
    if not logs:
        raise StartError(_nothing(deployment, process))
    for log in logs.values():
        yield from log.last(num_lines)
    was_known, is_down = deployment in names(), False
    while follow and not is_down:
        sleep(_POLL_S)
        is_down = was_known and deployment not in names()  # asked first: the logs are complete then
        for path in _paths(deployment, process):  # a process that was started again has a new one
            yield from logs.setdefault(path, _Log(path)).read()


def _paths(deployment: str, process: str | None) -> list[Path]:
    """Oldest first."""
    paths = [path for path in _folder(deployment).glob("*.log") if process is None or _is_of(path, process)]
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def _is_of(path: Path, process: str) -> bool:
    """scheduler-0.log, and scheduler-0.2.log of its second start."""
    rest = path.name.removesuffix(".log").removeprefix(process)
    return path.name.startswith(process) and (not rest or (rest[0] == "." and rest[1:].isdigit()))


def _folder(deployment: str) -> Path:
    return folder_of(deployment) / "logs"


def _nothing(deployment: str, process: str | None) -> str:
    here = ", ".join(sorted({path.name.removesuffix(".log") for path in _folder(deployment).glob("*.log")})) or "none"
    which = f"of {process} " if process else ""
    elsewhere = "a process writes its log on the node where it runs"
    return f"there is no log {which}in {_folder(deployment)}: logs here: {here}; {elsewhere}"
