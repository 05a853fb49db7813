"""Requests of the HTTP API, read as the requests of gRPC that mean the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echelon.pb.inference_pb2 import Attention, GenerateRequest, Speculation
from echelon.pb.reading_pb2 import Echo, Presentation, Reading
from echelon.pb.sampling_pb2 import SamplingParams
from echelon.pb.scheduler_pb2 import Submit
from gateway.requests.openai.bodies import GenerateBody, ignored_fields
from gateway.requests.openai.structured import structured_output_of
from gateway.requests.reasoning import reasoning_after
from gateway.requests.refusal import Refusal, Words, invalid, reworded
from gateway.requests.validation import RequestValidator, is_simple

# Fields of SamplingParams that have the same name in a body.
_SAMPLING = (
    "max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "prompt_logprobs",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a body asks for, in the words of gRPC."""

    requests: Sequence[GenerateRequest]  # one for each prompt
    presentation: Presentation
    words: Words  # what a body of OpenAI's calls our fields
    skin_words: Words = ()  # what another body calls its fields
    echoes: bool = False
    forced_calls: Sequence[Mapping[str, Any]] | None = None  # the grammar of calls to which the answer keeps

    @property
    def is_simple(self) -> bool:
        """It costs no more than its bytes."""
        return len(self.requests) == 1 and is_simple(self.requests[0])


def read_asked(asked: Asked, validator: RequestValidator) -> Reading:
    """Raises Refusal naming the client's field."""
    submits = [_validate(request, asked, validator, number) for number, request in enumerate(asked.requests)]
    reading = Reading(submits=submits, presentation=asked.presentation)
    if asked.presentation.reasoning:
        reading.presentation.reasoning = reasoning_after(submits[0].prompt_token_ids, validator.tokenizer)
    if asked.echoes:
        echoes = (_echo(*both, validator) for both in zip(asked.requests, submits, strict=True))
        reading.presentation.echoes.extend(echoes)
    return reading


def common_request(body: GenerateBody) -> GenerateRequest:
    """All but the prompt. Raises Refusal."""
    _check(body)
    request = GenerateRequest(model=body.model or "", sampling=_sampling(body), cache_salt=body.cache_salt or "")
    if body.speculation is not None:
        request.speculation.CopyFrom(Speculation(**body.speculation.model_dump(exclude_none=True)))
    if body.attention is not None:
        request.attention.CopyFrom(Attention(mode=body.attention.mode or ""))
    if structured := structured_output_of(body):
        request.structured_output.CopyFrom(structured[0])
    return request


def presentation_of(body: GenerateBody) -> Presentation:
    options = body.stream_options
    return Presentation(
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
        drafted=bool(body.return_drafted),
        ignored_fields=ignored_fields(body),
    )


def _check(body: GenerateBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid(f"best_of: must be n, {body.n or 1}, got {body.best_of}; samples are not ranked")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: needs stream: true")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs: are not streamed; leave stream out")


def _sampling(body: GenerateBody) -> SamplingParams:
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(**given)
    if body.stop is not None:
        sampling.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop)
    if body.seed is not None:
        sampling.seed = body.seed % 2**64
    for token_id, bias in (body.logit_bias or {}).items():
        sampling.logit_bias[int(token_id)] = bias
    return sampling


def _validate(request: GenerateRequest, asked: Asked, validator: RequestValidator, number: int) -> Submit:
    try:
        return validator.validate(request, asked.forced_calls)
    except Refusal as refusal:
        raise reworded(reworded(refusal, asked.words, number), asked.skin_words) from refusal


def _echo(request: GenerateRequest, submit: Submit, validator: RequestValidator) -> Echo:
    token_ids = submit.prompt_token_ids
    decode = validator.tokenizer.decode
    text = request.text if request.WhichOneof("input") == "text" else decode(token_ids)
    return Echo(text=text, first_token=decode(token_ids[:1]))
