"""What the tiers have saved."""

from dataclasses import dataclass, field
from math import isfinite


@dataclass(slots=True)
class Gain:
    """Of one tier, in seconds."""

    avoided_s: float = 0.0  # that computing what came back would have taken
    waited_s: float = 0.0  # in which seqs waited for it, or in vain


@dataclass(slots=True)
class Gains:
    """Of the prefixes that came back from host memory and from disk. One of both counts for each by its blocks."""

    host: Gain = field(default_factory=Gain)
    disk: Gain = field(default_factory=Gain)

    def add(self, num_blocks: int, num_from_host: int, num_come: int, *, avoided_s: float, waited_s: float) -> None:
        """`num_blocks` were fetched, the first `num_from_host` of them from host memory, and the first `num_come` came.
        `avoided_s`: to compute these; not finite if that is not known."""
        num_host = min(num_come, num_from_host)
        for gain, num_wanted, num_got in (
            (self.host, num_from_host, num_host),
            (self.disk, num_blocks - num_from_host, num_come - num_host),
        ):
            gain.waited_s += waited_s * num_wanted / num_blocks
            if num_got and isfinite(avoided_s):
                gain.avoided_s += avoided_s * num_got / num_come
