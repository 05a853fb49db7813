"""The body of /v1/completions, in the words of gRPC."""

from echelon.pb.inference_pb2 import GenerateRequest
from gateway.requests.openai.bodies import CompletionBody, parse_body
from gateway.requests.openai.reading import Asked, common_request, presentation_of
from gateway.requests.openai.structured import structured_words
from gateway.requests.refusal import invalid

_MAX_SAMPLES = 1024  # of all prompts; 65,536 would hold up the gateway for half a second


def ask_completion(data: bytes) -> Asked:
    """Raises Refusal."""
    body = parse_body(CompletionBody, data)
    presentation = presentation_of(body)
    if body.echo and body.max_tokens == 0:
        presentation.only_echo, body.max_tokens = True, 1  # the least that is computed
    common = common_request(body)
    _ask_logprobs(body, common)
    prompts, field = _prompts(body)
    words = (("sampling.", ""), ("text:", f"{field}:"), ("token_ids:", f"{field}:"), ("token_ids[", f"{field}["))
    return Asked(
        requests=[_request(prompt, body, common) for prompt in prompts],
        presentation=presentation,
        words=(*words, *structured_words(body)),
        echoes=bool(body.echo),
    )


def _ask_logprobs(body: CompletionBody, common: GenerateRequest) -> None:
    if body.logprobs is None:
        return
    common.sampling.logprobs = body.logprobs
    if body.echo:
        if body.stream:
            raise invalid("logprobs: are not streamed for the prompt; leave out stream or echo")
        common.sampling.prompt_logprobs = max(body.logprobs, body.prompt_logprobs or 0)


def _prompts(body: CompletionBody) -> tuple[list[str | list[int]], str]:
    """Each prompt, and what a client calls the one with number {}."""
    prompt = body.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt], "prompt"  # type: ignore[list-item]
    num_samples = len(prompt) * (body.n or 1)
    if num_samples > _MAX_SAMPLES:
        raise invalid(f"prompt: at most {_MAX_SAMPLES} samples of all prompts are allowed, got {num_samples}")
    return prompt, "prompt[{}]"  # type: ignore[return-value]


def _request(prompt: str | list[int], body: CompletionBody, common: GenerateRequest) -> GenerateRequest:
    request = GenerateRequest()
    request.CopyFrom(common)
    if isinstance(prompt, str):
        request.text = prompt
        if body.add_special_tokens is not None:
            request.add_special_tokens = body.add_special_tokens
    else:
        request.token_ids.ids.extend(prompt)
    return request
