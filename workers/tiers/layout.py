"""What decides the bits of a KV block, as a name."""

import hashlib
import json
from collections.abc import Mapping


def layout_digest(facts: Mapping[str, str | int | bool]) -> str:
    """32 hexadecimal digits. Equal facts give equal digests, in whatever order they come."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
