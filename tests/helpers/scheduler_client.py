"""A gateway reduced to what tests of whole streams need: one stream to a scheduler and the replies on it."""

import queue
from typing import Any

from echelon.pb import inference_pb2, sampling_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.helpers.sampling_params import resolved_sampling

Sample = tuple[str, int]  # request_id, index of the sample


class SchedulerClient:
    """Submits requests on one stream and gathers the replies. `defaults`: SamplingParams of every request."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerStub, **defaults: Any) -> None:
        self._defaults = defaults
        self._requests: queue.SimpleQueue[scheduler_pb2.SchedulerRequest | None] = queue.SimpleQueue()
        batches = stub.Connect(iter(self._requests.get, None))
        self._replies = (reply for batch in batches for reply in batch.replies)
        self.tokens: dict[Sample, list[int]] = {}
        self.logprobs: dict[Sample, list[sampling_pb2.PositionLogprobs]] = {}
        self.text: dict[Sample, str] = {}
        self.ends: dict[str, inference_pb2.GenerateComplete] = {}

    def submit(
        self, request_id: str, prompt: list[int], *, num_drafts: int | None = None, grammar: str = "", **sampling: Any
    ) -> None:
        """`num_drafts`: drafts per round; 0 switches speculation off, None leaves it to the deployment."""
        speculation = inference_pb2.Speculation()
        if num_drafts is not None:
            speculation.enabled = num_drafts > 0
            speculation.num_speculative_tokens = num_drafts
        message = scheduler_pb2.Submit(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=resolved_sampling(**self._defaults | sampling),
            speculation=speculation,
            grammar=grammar,
        )
        self._requests.put(scheduler_pb2.SchedulerRequest(submit=message))

    def cancel(self, request_id: str) -> None:
        self._requests.put(scheduler_pb2.SchedulerRequest(cancel=scheduler_pb2.Cancel(request_id=request_id)))

    def next_reply(self) -> scheduler_pb2.SchedulerReply:
        reply = next(self._replies)
        assert not reply.HasField("error"), reply.error
        if reply.HasField("chunk"):
            key = (reply.request_id, reply.chunk.index)
            self.tokens.setdefault(key, []).extend(reply.chunk.token_ids)
            self.logprobs.setdefault(key, []).extend(reply.chunk.logprobs)
            self.text[key] = self.text.get(key, "") + reply.chunk.text
        else:
            self.ends[reply.request_id] = reply.complete
        return reply

    def finish(self, num_requests: int) -> None:
        """Waits until so many requests are complete; after that, none can be submitted."""
        while len(self.ends) < num_requests:
            self.next_reply()
        self._requests.put(None)
