"""Holds the replies to one request until its client takes them."""

import asyncio
from dataclasses import dataclass, field

from echelon.pb import inference_pb2, scheduler_pb2

Final = inference_pb2.GenerateComplete | scheduler_pb2.RequestError


@dataclass(slots=True)
class _PendingChunk:
    """Chunks of one sample that the client has not taken yet, merged into one."""

    chunk: inference_pb2.GenerateChunk
    later_text: list[str] = field(default_factory=list)

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        self.chunk.token_ids.extend(chunk.token_ids)
        self.chunk.logprobs.extend(chunk.logprobs)
        self.chunk.drafted.extend(chunk.drafted)
        self.later_text.append(chunk.text)  # joined once: a stalled client must not cost quadratic time

    def merged(self) -> inference_pb2.GenerateChunk:
        if self.later_text:
            self.chunk.text += "".join(self.later_text)
        return self.chunk


class Mailbox:
    """At most one chunk for each sample and the final message: what a client that does not read can hold is bounded
    by the length of its own output, and the reader of the scheduler's stream never waits for a client.

    `put` and `finish` set `filled`, which several mailboxes can share.
    """

    def __init__(self, filled: asyncio.Event) -> None:
        self._pending: dict[int, _PendingChunk] = {}
        self._final: Final | None = None
        self._filled = filled

    def put(self, chunk: inference_pb2.GenerateChunk) -> None:
        pending = self._pending.get(chunk.index)
        if pending is None:
            self._pending[chunk.index] = _PendingChunk(chunk)
        else:
            pending.add(chunk)
        self._filled.set()

    def finish(self, final: Final) -> None:
        self._final = final
        self._filled.set()

    def take(self) -> tuple[list[inference_pb2.GenerateChunk], Final | None]:
        """The chunks so far, and the final message if it has come."""
        chunks = [pending.merged() for pending in self._pending.values()]
        self._pending.clear()
        return chunks, self._final
