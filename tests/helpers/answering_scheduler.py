"""A scheduler that answers every request at once with a few tokens, and everything that was asked of them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from echelon.pb import inference_pb2 as pb
from echelon.pb import scheduler_pb2
from echelon.pb.sampling_pb2 import PositionLogprobs, TokenLogprob
from tests.helpers.fake_scheduler import FakeScheduler

_TOKENS = (5, 6, 7)


class AnsweringScheduler(FakeScheduler):
    """`num_answered`: requests so far."""

    def __init__(self) -> None:
        super().__init__()
        self.num_answered = 0
        self.trace = []

    async def Connect(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.streams_opened.release()
        async for request in request_iterator:
            if request.HasField("submit"):
                self.num_answered += 1
                for reply in _replies(request.submit):
                    yield scheduler_pb2.SchedulerReplies(replies=[reply])

    async def Trace(self, request: scheduler_pb2.TraceRequest, context: Any) -> AsyncIterator[Any]:
        """Ends soon, whatever its limits."""
        yield scheduler_pb2.TraceEvent(round=scheduler_pb2.TracedRound(engine=1, round_id=1))
        await asyncio.sleep(0.01)


def _replies(submit: scheduler_pb2.Submit) -> Iterator[scheduler_pb2.SchedulerReply]:
    token_ids = _TOKENS[: max(1, submit.sampling.max_tokens)]
    for index in range(submit.sampling.n):
        wants = submit.sampling.HasField("logprobs")
        chunk = pb.GenerateChunk(
            index=index,
            token_ids=token_ids,
            text="abc"[: len(token_ids)],
            logprobs=[_position(token_id, submit.sampling.logprobs) for token_id in token_ids] if wants else (),
            drafted=[False] * len(token_ids),
        )
        yield scheduler_pb2.SchedulerReply(request_id=submit.request_id, chunk=chunk)
    prompt = submit.prompt_token_ids if submit.sampling.HasField("prompt_logprobs") else ()
    complete = pb.GenerateComplete(
        finished=[
            pb.Finished(index=index, reason=pb.FINISH_REASON_LENGTH, num_tokens=len(token_ids))
            for index in range(submit.sampling.n)
        ],
        usage=pb.Usage(prompt_tokens=len(submit.prompt_token_ids), completion_tokens=len(token_ids)),
        prompt_logprobs=[
            _position(token_id, submit.sampling.prompt_logprobs) if number else PositionLogprobs()
            for number, token_id in enumerate(prompt)
        ],
        seed=submit.sampling.seed,
    )
    yield scheduler_pb2.SchedulerReply(request_id=submit.request_id, complete=complete)


def _position(token_id: int, num_top: int) -> PositionLogprobs:
    chosen = TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, text="a")
    others = (TokenLogprob(token_id=token_id + i, logprob=-0.5 - i, rank=i + 1, text="b") for i in range(num_top))
    return PositionLogprobs(chosen=chosen, top=others)
