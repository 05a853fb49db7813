"""Where processes listen, as Linux says in /proc."""

import ipaddress
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """IP addresses of the TCP sockets on which these processes accept connections."""
    inodes = {link.readlink().name for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in inodes:
                found.add(_address(fields[1].split(":")[0]))
    return found


def _address(words: str) -> str:
    """From words of 32 bits, each in the order of this machine's bytes."""
    raw = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
