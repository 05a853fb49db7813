"""Outputs that wait to be sent to a gateway, and the messages that they become."""

import asyncio
from typing import Any

from echelon.pb import inference_pb2, scheduler_pb2
from scheduler.engines.engine import EngineView
from scheduler.requests.outputs import Chunk, Completed, Failed, Output


class _CacheReports:
    """What one gateway has not been told yet of one target's cache."""

    def __init__(self, engine: EngineView[Any]) -> None:
        self.engine = engine
        self._watch = engine.contents.watch()

    @property
    def has_news(self) -> bool:
        return self._watch.has_changes

    def take(self) -> scheduler_pb2.CacheReport:
        changes = self._watch.take()
        return scheduler_pb2.CacheReport(
            from_nothing=changes.from_nothing,
            block_size=self.engine.info.block_size,
            num_blocks=self.engine.info.num_blocks,
            added=changes.added,
            removed=changes.removed,
        )

    def close(self) -> None:
        self.engine.contents.unwatch(self._watch)


class Outbox:
    """Outputs that wait for one gateway: at most one chunk a sample, however slowly it reads."""

    def __init__(self) -> None:
        self._cache: _CacheReports | None = None
        self.tenants: dict[str, str] = {}  # by the id of each request that runs for this gateway
        self._pending: list[list[Output]] = []  # chunks of a sample, to be merged, or one output of another kind
        self._growing: dict[str, dict[int, list[Output]]] = {}  # by request and sample: the chunks that still grow
        self._filled = asyncio.Event()

    def put(self, output: Output) -> None:
        if isinstance(output, Chunk):
            samples = self._growing.setdefault(output.request_id, {})
            if output.index not in samples:
                self._pending.append(samples.setdefault(output.index, []))
            samples[output.index].append(output)
        else:
            self._pending.append([output])
            self._growing.pop(output.request_id, None)  # later outputs under this id come after this one
        self._filled.set()

    def look_at_cache(self, engine: EngineView[Any] | None) -> None:
        """It may have changed, and so may the engine. None: nobody listens any more."""
        if self._cache is not None and self._cache.engine is not engine:
            self._cache.close()
            self._cache = None
        if self._cache is None and engine is not None:
            self._cache = _CacheReports(engine)
        if self._has_news:
            self._filled.set()

    @property
    def _has_news(self) -> bool:
        return self._cache is not None and self._cache.has_news

    async def take_all(self) -> scheduler_pb2.SchedulerReplies:
        """All that is ready; waits until there is something."""
        while not self._pending and not self._has_news:
            self._filled.clear()
            await self._filled.wait()
        replies = scheduler_pb2.SchedulerReplies(replies=map(_reply, map(_merged, self._pending)))
        self._pending.clear()
        self._growing.clear()
        if self._cache is not None and self._cache.has_news:
            replies.cache.CopyFrom(self._cache.take())
        return replies


def _merged(outputs: list[Output]) -> Output:
    """Join the chunks of a sample. Once only: appending each to those before it would be quadratic in a long wait."""
    first = outputs[0]
    if len(outputs) == 1 or not isinstance(first, Chunk):
        return first
    chunks = [output for output in outputs if isinstance(output, Chunk)]
    return Chunk(
        request_id=first.request_id,
        index=first.index,
        offset=first.offset,
        token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
        text="".join(chunk.text for chunk in chunks),
        logprobs=[entry for chunk in chunks for entry in chunk.logprobs],
        drafted=[each for chunk in chunks for each in chunk.drafted],
    )


def _reply(output: Output) -> scheduler_pb2.SchedulerReply:
    match output:
        case Chunk():
            chunk = inference_pb2.GenerateChunk(
                index=output.index,
                token_ids=output.token_ids,
                text=output.text,
                logprobs=output.logprobs,
                offset=output.offset,
                drafted=output.drafted,
            )
            return scheduler_pb2.SchedulerReply(request_id=output.request_id, chunk=chunk)
        case Completed():
            return scheduler_pb2.SchedulerReply(request_id=output.request_id, complete=output.message)
        case Failed():
            error = scheduler_pb2.RequestError(code=output.code, message=output.message)
            return scheduler_pb2.SchedulerReply(request_id=output.request_id, error=error)
