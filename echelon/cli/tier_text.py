"""How the tiers of an engine's KV cache are shown."""

from typing import Protocol

from rich.text import Text

from echelon.cli.output import size_text


class ShownTier(Protocol):
    """Bytes are those of one rank."""

    @property
    def engine(self) -> str: ...

    @property
    def tier(self) -> str: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def paused(self) -> bool: ...

    @property
    def last_error(self) -> str: ...


def fill_of(tier: ShownTier) -> tuple[str, str]:
    """What is used, and what fits."""
    return size_text(tier.used_bytes), size_text(tier.capacity_bytes)


def state_of(tier: ShownTier) -> Text:
    return Text("paused", style="yellow") if tier.paused else Text("")


def trouble_of(tier: ShownTier) -> str:
    """Empty: there was none."""
    if tier.paused:
        return f"paused after errors, the last one: {tier.last_error}"
    return f"last error: {tier.last_error}" if tier.last_error else ""
