"""Outputs that wait to be sent to a gateway, and the messages that they become."""

import asyncio

from echelon.pb import inference_pb2, scheduler_pb2
from scheduler.requests.outputs import Chunk, Completed, Failed, Output


class Outbox:
    """Outputs that wait for one gateway: at most one chunk a sample, however slowly it reads."""

    def __init__(self) -> None:
        self.request_ids: set[str] = set()  # of requests that run for this gateway
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

    async def take_all(self) -> scheduler_pb2.SchedulerReplies:
        """All that is ready; waits until there is something."""
        while not self._pending:
            self._filled.clear()
            await self._filled.wait()
        replies = scheduler_pb2.SchedulerReplies(replies=map(_reply, map(_merged, self._pending)))
        self._pending.clear()
        self._growing.clear()
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
            )
            return scheduler_pb2.SchedulerReply(request_id=output.request_id, chunk=chunk)
        case Completed():
            return scheduler_pb2.SchedulerReply(request_id=output.request_id, complete=output.message)
        case Failed():
            error = scheduler_pb2.RequestError(code=output.code, message=output.message)
            return scheduler_pb2.SchedulerReply(request_id=output.request_id, error=error)
