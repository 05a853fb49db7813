"""The gateways of one deployment, of which a client uses one until it fails."""

from collections.abc import Sequence


class Rotation:
    """Safe to share among threads: at worst one more gateway is passed over."""

    def __init__(self, addresses: str | Sequence[str]) -> None:
        """host:port of each; several in one text are separated by commas. Raises ValueError if there is none."""
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        self.addresses = tuple(address.strip() for address in given if address.strip())
        if not self.addresses:
            raise ValueError(f"address: host:port of at least one gateway is needed, got {addresses!r}")
        self._index = 0

    @property
    def current(self) -> str:
        return self.addresses[self._index]

    def leave(self, address: str) -> None:
        """Nobody serves there: go on with the next, unless somebody else has already done so."""
        index = self._index
        if self.addresses[index] == address:
            self._index = (index + 1) % len(self.addresses)
