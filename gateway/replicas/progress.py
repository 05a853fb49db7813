"""A running request, and what it needs to go on at another scheduler, should its own be lost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import grpc

from echelon.pb import inference_pb2, scheduler_pb2
from gateway.metrics import RequestMeter
from gateway.replicas.mailbox import Final, Mailbox
from gateway.requests.refusal import status_code

_LOSSES_OF_A_SUSPECT = 2  # of its scheduler, since a request has brought something
_MOST_LOSSES = 3


@dataclass(slots=True)
class _Sample:
    """What has come of one sample. A client that does not read gets it all the same, from its mailbox."""

    token_ids: list[int] = field(default_factory=list)
    num_chars: int = 0

    @classmethod
    def of(cls, sample: inference_pb2.ResumedSample) -> Self:
        return cls(list(sample.token_ids), sample.num_chars)


class Progress:
    """`now`: a clock in seconds; `was_sent`: to a scheduler, ever."""

    def __init__(self, submit: scheduler_pb2.Submit, now: Callable[[], float], *, was_sent: bool) -> None:
        self.num_losses = 0  # of its scheduler, since something came
        self._was_sent = was_sent
        self._has_come = False  # anything, here
        self._submit = submit
        self._now = now
        self._sent_s = now()
        resumed = submit.resume_from  # what the client has from another gateway
        self._began_s = self._sent_s - resumed.elapsed_s
        self._first_token_s = self._began_s + resumed.first_token_s if resumed.HasField("first_token_s") else None
        self._samples = [_Sample.of(each) for each in resumed.samples] or [_Sample() for _ in range(submit.sampling.n)]

    @property
    def model_id(self) -> str:
        return self._submit.model_id

    @property
    def tenant(self) -> str:
        return self._submit.tenant

    @property
    def age_s(self) -> float:
        return self._now() - self._sent_s

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._submit.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Of all samples."""
        return sum(len(sample.token_ids) for sample in self._samples)

    def on_chunk(self, chunk: inference_pb2.GenerateChunk) -> None:
        self.num_losses, self._has_come = 0, True
        sample = self._samples[chunk.index]
        sample.token_ids.extend(chunk.token_ids)
        sample.num_chars += len(chunk.text)
        if self._first_token_s is None and chunk.token_ids:
            self._first_token_s = self._now()

    def adjust(self, params: inference_pb2.Speculation) -> None:
        """The request speculates like this from now on."""
        self._submit.speculation.CopyFrom(params)

    def begin_again(self) -> None:
        """A scheduler has ended the request. If nothing has come of it, the next one gets it like a new one."""
        if not self._has_come:
            self._was_sent = False

    def submit_again(self) -> scheduler_pb2.Submit | None:
        """The request with what its client has of it; None if its time is over."""
        now = self._now()
        submit = scheduler_pb2.Submit()
        submit.CopyFrom(self._submit)
        if submit.HasField("timeout_s"):
            submit.timeout_s -= now - self._sent_s
            if submit.timeout_s <= 0:
                return None
        if not self._was_sent:
            self._was_sent = True
            return submit
        submit.was_accepted = True
        submit.resume_from.CopyFrom(inference_pb2.Resume(elapsed_s=now - self._began_s))
        if self._first_token_s is not None:
            submit.resume_from.first_token_s = self._first_token_s - self._began_s
        submit.resume_from.samples.extend(
            inference_pb2.ResumedSample(token_ids=sample.token_ids, num_chars=sample.num_chars)
            for sample in self._samples
        )
        return submit


@dataclass(slots=True)
class RunningRequest:
    """A request that the scheduler has not ended yet."""

    mailbox: Mailbox | None  # None: nobody waits for the replies any more
    meter: RequestMeter
    progress: Progress
    is_sent: bool = True  # on the present stream
    is_cancelled: bool = False  # by its client, which waits for the end
    refused_by: list[object] = field(default_factory=list)  # links whose schedulers have no room for it

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ends the scheduler: nothing came of it before that happened, again and again."""
        return self.progress.num_losses >= _LOSSES_OF_A_SUSPECT

    def on_loss(self, request_id: str) -> bool:
        """Its scheduler was lost. Returns whether that was its end: its client has gone, or it ends its scheduler each
        time."""
        self.progress.num_losses += self.is_sent
        self.is_sent = False
        if self.mailbox is None:
            self.meter.on_error(grpc.StatusCode.UNAVAILABLE)
        elif self.progress.num_losses >= _MOST_LOSSES:
            what = f"the scheduler was lost {_MOST_LOSSES} times while request {request_id!r} ran"
            self.fail(grpc.StatusCode.INTERNAL, f"{what} and brought nothing; it is not tried again")
        else:
            return False
        return True

    def finish(self, final: Final) -> None:
        if isinstance(final, inference_pb2.GenerateComplete):
            self.meter.on_complete(final)
        else:
            self.meter.on_error(status_code(final.code))
        if self.mailbox is not None:
            self.mailbox.finish(final)

    def fail(self, code: grpc.StatusCode, message: str) -> None:
        self.finish(scheduler_pb2.RequestError(code=code.value[0], message=message))
