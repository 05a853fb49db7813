"""Responses of /v1/responses that can be continued or read again. In memory, for a limited time."""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

KEPT_S = 3600.0
_MAX_BYTES = 256 << 20
_PREVIOUS = re.compile(rb'"previous_response_id"\s*:\s*"([!#-~]{1,200})"')


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: str  # JSON, as it was answered
    items: str  # a JSON list: the conversation, with the answer
    until_s: float

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items)


class ResponseStore:
    """By caller and id; a caller sees its own alone. The oldest make room for new ones."""

    def __init__(self, clock: Callable[[], float], *, max_bytes: int = _MAX_BYTES) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()

    def put(self, caller: str, response_id: str, *, response: str, items: str) -> None:
        self.drop(caller, response_id)
        stored = StoredResponse(response, items, self._clock() + KEPT_S)
        self._stored[caller, response_id] = stored
        self._num_bytes += stored.num_bytes
        while self._stored:
            oldest = next(iter(self._stored))
            if self._num_bytes <= self._max_bytes and self._stored[oldest].until_s > self._clock():
                break
            self.drop(*oldest)

    def get(self, caller: str, response_id: str) -> StoredResponse | None:
        stored = self._stored.get((caller, response_id))
        return stored if stored is not None and stored.until_s > self._clock() else None

    def drop(self, caller: str, response_id: str) -> bool:
        """Whether it was there."""
        stored = self._stored.pop((caller, response_id), None)
        if stored is not None:
            self._num_bytes -= stored.num_bytes
        return stored is not None

    def earlier(self, caller: str, body: bytes) -> dict[str, str]:
        """The items of responses that a body may name as its previous one. Here it is only searched."""
        ids = {found.decode() for found in _PREVIOUS.findall(body)}
        known = {response_id: self.get(caller, response_id) for response_id in ids}
        return {response_id: stored.items for response_id, stored in known.items() if stored is not None}
