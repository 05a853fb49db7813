"""Where processes listen, according to Linux's /proc."""

import contextlib
import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path

_LISTEN = "0A"


def listening_sockets(pids: Iterable[int]) -> set[tuple[str, int]]:
    """The IP address and port of each TCP socket on which these processes accept connections."""
    open_files = {name for pid in pids for name in _open_files(pid)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in open_files:
                words, port = fields[1].split(":")
                found.add((_address(words), int(port, 16)))
    return found


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):  # the process has ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                yield link.readlink().name


def _address(words: str) -> str:
    """The address, from 32-bit words in this machine's byte order."""
    raw = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
