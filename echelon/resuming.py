"""A request that outlives the gateway that serves it: what has come of it is enough to go on elsewhere. Pure."""

from collections.abc import Callable

import grpc

from echelon.pb import inference_pb2
from echelon.results import Chunk, Completion, CompletionBuilder

FINAL_KEY = "echelon-final"  # in the trailing metadata with which a gateway says that a request has failed
_MIN_DELAY_S, _MAX_DELAY_S = 0.05, 1.0  # between attempts, twice as long each time; not measured
_MOST_LOSSES = 3  # in a row without a token between them: the request itself may be what ends gateways
# How a stream ends whose gateway is lost or leaves, and how attempts to resume it fail that may succeed later: the old
# gateway has not noticed yet that its client has left, or too many others came first.
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.RESOURCE_EXHAUSTED)


class ResumableRequest:
    """What to send for a request, at first and after each loss. `now`: a clock in seconds."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_s: float | None,
        resume_within_s: float,
        num_gateways: int = 1,
        now: Callable[[], float],
    ) -> None:
        """`timeout_s`: for everything. After a loss the request is given up if no gateway has taken it for
        `resume_within_s`; 0: at once."""
        self._num_untried = num_gateways  # before one has taken it
        self._request = request
        self._timeout_s = timeout_s
        self._resume_within_s = resume_within_s
        self._now = now
        self._began_s = now()
        self._first_token_s: float | None = None
        self._lost_s: float | None = None  # when; None while a gateway serves it
        self._delay_s = 0.0
        self._num_losses = 0  # since something came
        self._builder = CompletionBuilder()

    @property
    def request_id(self) -> str:
        """Empty before the first message."""
        return self._builder.request_id

    def remaining_s(self) -> float | None:
        """What is left of the timeout."""
        return None if self._timeout_s is None else max(0.0, self._timeout_s - (self._now() - self._began_s))

    def on_message(self, response: inference_pb2.GenerateResponse) -> Chunk | None:
        """The chunk in it, if it has one."""
        self._lost_s = None
        chunk = self._builder.add(response)
        if chunk is not None and chunk.token_ids:
            self._num_losses = 0
            self._first_token_s = self._now() if self._first_token_s is None else self._first_token_s
        return chunk

    def delay_after(self, code: grpc.StatusCode, *, is_final: bool) -> float | None:
        """A call has failed: how long to wait before the next. None: the request has failed with it.

        `is_final`: the gateway says so itself; nevertheless another one may still take a request that was lost.

        A request that no gateway has taken yet is tried once at each: then whoever sent it may try again.
        """
        now = self._now()
        if self._builder.seed is None:
            self._num_untried -= 1
            return 0.0 if code is grpc.StatusCode.UNAVAILABLE and self._num_untried else None
        if self._lost_s is None:
            self._num_losses += 1
            if code is not grpc.StatusCode.UNAVAILABLE or is_final or self._num_losses > _MOST_LOSSES:
                return None
            self._lost_s, self._delay_s = now, _MIN_DELAY_S
        elif code not in _PASSING:
            return None
        if now - self._lost_s + self._delay_s > self._resume_within_s:
            return None
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, _MAX_DELAY_S)
        return delay_s

    def message(self) -> inference_pb2.GenerateRequest:
        """The request as it is sent now."""
        if self._builder.seed is None:
            return self._request
        again = inference_pb2.GenerateRequest()
        again.CopyFrom(self._request)
        again.request_id, again.sampling.seed = self._builder.request_id, self._builder.seed
        again.resume_from.model_id = self._builder.model_id
        again.resume_from.elapsed_s = self._now() - self._began_s
        if self._first_token_s is not None:
            again.resume_from.first_token_s = self._first_token_s - self._began_s
        again.resume_from.samples.extend(self._builder.received(self._request.sampling.n or 1))
        return again

    def result(self) -> Completion:
        """Once the stream has ended."""
        return self._builder.result()
