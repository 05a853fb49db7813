"""What the Python client returns, and how it is put together from the messages of a stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from echelon.errors import EchelonError
from echelon.pb import inference_pb2, sampling_pb2

FinishReason = Literal["stop", "length", "abort"]

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    token_id: int
    logprob: float  # log-softmax of the raw logits
    rank: int | None  # 1 is the most likely; None where it was not counted
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """The token at one position and the most likely candidates there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens that were committed together. `text` can lag behind `token_ids`: it never holds half a character."""

    index: int  # which of n
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]  # one for each token, if asked for
    offset: int  # number of output tokens before these
    drafted: tuple[bool, ...] = ()  # for each token: it was drafted, and the target agreed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of the n outputs."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason
    stop_str: str | None  # the stop string that matched
    stop_token_id: int | None  # the EOS or stop token that ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # of all samples
    cached_prompt_tokens: int  # not computed, since the prefix cache had them: on the device, or ...
    cached_prompt_tokens_from_host: int  # ... of them, in host memory
    cached_prompt_tokens_from_disk: int  # ... or on disk
    approximations: tuple[str, ...] = ()  # what made the output approximate, as "key: value" of the deployment file


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationStats:
    num_rounds: int  # target rounds that committed tokens, summed over the samples
    num_drafts: int  # those of them in which drafts were compared
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...]  # [i]: how often draft i of a round was accepted

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts of all drafts; None without any."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Measured by the server, from the arrival at the scheduler."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request. `text`, `token_ids`, `logprobs` and `finish_reason` are those of the first sample."""

    request_id: str
    samples: tuple[Sample, ...]
    usage: Usage
    speculation: SpeculationStats
    timings: Timings
    seed: int  # given or drawn: replays the request
    prompt_logprobs: tuple[PositionLogprobs | None, ...]  # if asked for; None at position 0

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...]:
        return self.samples[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason

    @property
    def tokens_per_target_step(self) -> float | None:
        """Tokens that one forward of the target yielded on average: above 1 is what speculation gave."""
        rounds = self.speculation.num_rounds
        return self.usage.completion_tokens / rounds if rounds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    version: str
    uptime_s: float
    num_replicas: int
    num_ready_replicas: int


class CompletionBuilder:
    """Collects the messages of one stream."""

    def __init__(self) -> None:
        self.request_id = ""
        self.seed: int | None = None  # once a gateway has taken the request
        self.model_id = ""  # by then
        self._completion: Completion | None = None
        self._chunks: list[Chunk] = []

    def add(self, response: inference_pb2.GenerateResponse) -> Chunk | None:
        """The chunk in a message; None for the first message and for the last, which completes the completion."""
        self.request_id = response.request_id
        kind = response.WhichOneof("message")
        if kind == "started":
            self.seed, self.model_id = response.started.seed, response.started.model_id
        elif kind == "complete":
            self._completion = self._complete(response.complete)
        return self._take(response.chunk) if kind == "chunk" else None

    def received(self, num_samples: int) -> Iterator[inference_pb2.ResumedSample]:
        """What has come so far, by sample."""
        for index in range(num_samples):
            chunks = [chunk for chunk in self._chunks if chunk.index == index]
            yield inference_pb2.ResumedSample(
                token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
                num_chars=sum(len(chunk.text) for chunk in chunks),
            )

    def _take(self, message: inference_pb2.GenerateChunk) -> Chunk:
        chunk = Chunk(
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=_positions(message.logprobs),
            offset=message.offset,
            drafted=tuple(message.drafted),
        )
        self._chunks.append(chunk)
        return chunk

    def result(self) -> Completion:
        """The completion, once the stream has ended."""
        if self._completion is None:
            raise EchelonError("INTERNAL", "the server ended the stream without its completion")
        return self._completion

    def _complete(self, complete: inference_pb2.GenerateComplete) -> Completion:
        stats = complete.speculation
        return Completion(
            request_id=self.request_id,
            samples=tuple(self._sample(finished) for finished in sorted(complete.finished, key=lambda f: f.index)),
            usage=Usage(
                prompt_tokens=complete.usage.prompt_tokens,
                completion_tokens=complete.usage.completion_tokens,
                cached_prompt_tokens=complete.usage.cached_prompt_tokens,
                cached_prompt_tokens_from_host=complete.usage.cached_prompt_tokens_from_host,
                cached_prompt_tokens_from_disk=complete.usage.cached_prompt_tokens_from_disk,
                approximations=tuple(complete.usage.approximations),
            ),
            speculation=SpeculationStats(
                num_rounds=stats.num_rounds,
                num_drafts=stats.num_drafts,
                num_draft_tokens=stats.num_draft_tokens,
                num_accepted_tokens=stats.num_accepted_tokens,
                accepted_per_position=tuple(stats.accepted_per_position),
            ),
            timings=Timings(
                queue_s=complete.timings.queue_s,
                first_token_s=complete.timings.first_token_s,
                total_s=complete.timings.total_s,
            ),
            seed=complete.seed,
            prompt_logprobs=tuple(
                _position(entry) if entry.HasField("chosen") else None for entry in complete.prompt_logprobs
            ),
        )

    def _sample(self, finished: inference_pb2.Finished) -> Sample:
        chunks = [chunk for chunk in self._chunks if chunk.index == finished.index]
        return Sample(
            index=finished.index,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
            logprobs=tuple(position for chunk in chunks for position in chunk.logprobs),
            finish_reason=_FINISH_REASONS[finished.reason],
            stop_str=finished.stop_str or None,
            stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        )


def _positions(entries: Iterable[sampling_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(_position(entry) for entry in entries)


def _position(entry: sampling_pb2.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(chosen=_token(entry.chosen), top=tuple(_token(token) for token in entry.top))


def _token(token: sampling_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=token.token_id, logprob=token.logprob, rank=token.rank or None, text=token.text)
