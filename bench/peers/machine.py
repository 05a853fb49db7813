"""How busy the machine was while a run was measured, and with whom. Linux only: elsewhere nothing is known."""

import os
import time
from pathlib import Path

PROC = Path("/proc")
IDLE_COLUMNS = (3, 4)  # idle and iowait in the first line of /proc/stat
GUEST_COLUMNS = 8  # what comes from here on is counted in user and nice too


class OtherWork:
    """Cores that other processes keep busy, and the host of a virtual machine takes, from now on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before_s = _others_s()

    def cores(self) -> float | None:
        now_s = _others_s()
        if now_s is None or self._before_s is None:
            return None
        return max(0.0, now_s - self._before_s) / (time.perf_counter() - self._started)


def _others_s() -> float | None:
    """CPU seconds of everything but this process and its descendants."""
    if not (PROC / "stat").exists():
        return None
    ticks = busy_ticks((PROC / "stat").read_text()) - tree_ticks(process_stats(), os.getpid())
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_ticks(stat: str) -> int:
    """Of all processors, from the text of /proc/stat."""
    columns = [int(column) for column in stat.splitlines()[0].split()[1 : 1 + GUEST_COLUMNS]]
    return sum(ticks for index, ticks in enumerate(columns) if index not in IDLE_COLUMNS)


def tree_ticks(stats: list[str], root: int) -> int:
    """Of a process and its descendants, those waited for included, from the texts of /proc/<pid>/stat."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in stats:
        pid, _, rest = stat.partition(" ")
        fields = rest.rpartition(")")[2].split()  # the name before it may hold spaces
        parents[int(pid)] = int(fields[1])
        ticks[int(pid)] = sum(int(field) for field in fields[11:15])

    def belongs(pid: int | None) -> bool:
        while pid is not None and pid != root:
            pid = parents.get(pid)
        return pid == root

    return sum(spent for pid, spent in ticks.items() if belongs(pid))


def process_stats() -> list[str]:
    stats = []
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                stats.append((folder / "stat").read_text())
            except OSError:
                continue  # it has just ended
    return stats
