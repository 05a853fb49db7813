"""A request from admission to its last message, and its samples, each with history and output."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from childproc.block_digests import DigestChain
from echelon.pb import inference_pb2, sampling_pb2
from scheduler.requests.draft_tally import DraftTally
from scheduler.requests.outputs import Completed
from scheduler.requests.stopping import Finish, OutputText


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTokens:
    """Tokens that need not be computed, by where their KV was."""

    total: int = 0  # the rest was on the device
    from_host: int = 0
    from_disk: int = 0

    def __add__(self, other: "CachedTokens") -> "CachedTokens":
        return CachedTokens(
            total=self.total + other.total,
            from_host=self.from_host + other.from_host,
            from_disk=self.from_disk + other.from_disk,
        )


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Request:
    """Others add to `seqs`, `speculation`, `prompt_logprobs` and `approximations`; the rest changes only through
    methods."""

    request_id: str
    tenant: str
    is_background: bool  # others go first
    is_budgeted: bool  # attention may read blocks in host memory
    num_prompt_tokens: int
    arrived_s: float
    deadline_s: float | None
    seed: int
    seqs: "list[Seq]" = field(default_factory=list)
    speculation: DraftTally = field(default_factory=DraftTally)
    admitted_s: float | None = None
    first_token_s: float | None = None
    is_finished: bool = False
    cached: CachedTokens = CachedTokens()  # of the first sample, at that of its starts which found least
    approximations: set[str] = field(default_factory=set)  # as in Usage
    # [i]: of prompt token i + 1, None while it has not been computed.
    prompt_logprobs: list[sampling_pb2.PositionLogprobs | None] | None = None  # None: not requested

    @property
    def max_len(self) -> int:
        """Most tokens of a sample, prompt included."""
        return max(seq.max_len for seq in self.seqs)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None and None in self.prompt_logprobs

    def admit(self, seq: "Seq", now: float, cached: CachedTokens) -> bool:
        """A sample starts with the KV of `cached`. Returns whether it is the first start of any sample."""
        if self.admitted_s is None:
            self.admitted_s, self.cached = now, cached
            return True
        if seq.index == 0 and cached.total < self.cached.total:
            self.cached = cached  # it starts again, and some of what was cached is computed after all
        return False

    def note_token(self, now: float) -> None:
        """A sample has a new token."""
        if self.first_token_s is None:
            self.first_token_s = now

    def close(self) -> None:
        """The request has ended, one way or another."""
        self.is_finished = True

    def completion(self, now: float) -> Completed:
        message = inference_pb2.GenerateComplete(
            finished=[_finished(seq) for seq in self.seqs],
            usage=inference_pb2.Usage(
                prompt_tokens=self.num_prompt_tokens,
                completion_tokens=sum(seq.num_outputs for seq in self.seqs),
                cached_prompt_tokens=self.cached.total,
                cached_prompt_tokens_from_host=self.cached.from_host,
                cached_prompt_tokens_from_disk=self.cached.from_disk,
                approximations=sorted(self.approximations),
            ),
            speculation=self.speculation.message(),
            seed=self.seed,
            timings=self._timings(now),
        )
        if self.prompt_logprobs is not None:
            empty = sampling_pb2.PositionLogprobs()
            message.prompt_logprobs.extend([empty, *(entry or empty for entry in self.prompt_logprobs)])
        return Completed(request_id=self.request_id, message=message)

    def _timings(self, now: float) -> inference_pb2.RequestTimings:
        first_token = now if self.first_token_s is None else self.first_token_s
        # A request that was resumed was admitted here after its first token had come.
        admitted = first_token if self.admitted_s is None else min(self.admitted_s, first_token)
        return inference_pb2.RequestTimings(
            queue_s=admitted - self.arrived_s,
            first_token_s=first_token - self.arrived_s,
            total_s=now - self.arrived_s,
        )


class SeqStatus(Enum):
    HELD = auto()  # until the first sample of its request has computed the prompt
    WAITING = auto()  # for a slot and blocks
    FETCHING = auto()  # waits for blocks from other tiers of the KV cache
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Seq:
    """One sample of a request."""

    request: Request
    index: int  # which of n
    order: tuple[bool, int, int]  # background or not, then arrival; the smaller one goes first
    token_ids: list[int]  # prompt, then committed output
    max_len: int  # most tokens, prompt included
    sampling: sampling_pb2.SeqSampling
    output: OutputText
    digests: DigestChain
    status: SeqStatus = SeqStatus.HELD  # only the target's planner changes it
    finish: Finish | None = None

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    def commit(self, token_ids: Iterable[int]) -> Finish | None:
        """Append tokens to the history, up to the one that ends the seq."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            finish = self.output.push(token_id)
            if finish is not None:
                return finish
        return None


def _finished(seq: Seq) -> inference_pb2.Finished:
    assert seq.finish is not None, "a completed request has finished seqs only"
    message = inference_pb2.Finished(
        index=seq.index, reason=seq.finish.reason, stop_str=seq.finish.stop_str, num_tokens=seq.num_outputs
    )
    if seq.finish.stop_token_id is not None:
        message.stop_token_id = seq.finish.stop_token_id
    return message
