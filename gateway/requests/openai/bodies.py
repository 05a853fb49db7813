"""The bodies of OpenAI's API, with the fields that vLLM adds to it, and what they ask of Echelon."""

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.requests.refusal import Refusal, invalid

_MAX_SHOWN_CHARS = 100
_MAX_IGNORED = 16  # that are named to the client
_HEADER_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
_TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
_TokenIds = Annotated[list[_TokenId], Field(fail_fast=True)]
_Prompt = (
    str | _TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[_TokenIds], Field(fail_fast=True)]
)
_Objects = list[dict[str, Any]]

# Fields that would change the output and have no effect here, each with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class ApiObject(BaseModel):
    """Unknown fields are kept for who wants to name them."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(ApiObject):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SpeculationWish(ApiObject):
    """As the message of that name in the gRPC API."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool | None = None
    num_speculative_tokens: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    lower_draft: bool | None = None


class AttentionWish(ApiObject):
    """As the message of that name in the gRPC API."""

    model_config = ConfigDict(extra="forbid")

    mode: str | None = None


class StructuredOutputs(ApiObject):
    """As in vLLM; one of them."""

    model_config = ConfigDict(extra="forbid")

    as_json: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerateBody(ApiObject):
    """What completions and conversations have in common. A field that is null counts as one that is not there."""

    model: str | None = None
    max_tokens: _Int32 | None = None
    min_tokens: _Int32 | None = None
    n: _Int32 | None = None
    best_of: _Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None  # a negative one counts from 2**64
    stop: str | list[str] | None = None
    stop_token_ids: list[_Int32] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: _Int32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_drafted: bool | None = None
    cache_salt: str | None = None
    speculation: SpeculationWish | None = None
    attention: AttentionWish | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None  # these four: the former names of the same
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(GenerateBody):
    prompt: _Prompt
    max_tokens: _Int32 | None = 16  # OpenAI's default; null: as many as fit
    logprobs: _Int32 | None = None
    echo: bool | None = None


class ChatMessageBody(ApiObject):
    """Its other fields are for the template."""

    role: str
    content: str | _Objects | None = None
    tool_calls: _Objects | None = None


class ChatFields(ApiObject):
    """What makes a conversation a prompt."""

    messages: list[ChatMessageBody]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: _Objects | None = None
    documents: _Objects | None = None
    reasoning_effort: str | None = None


class ChatBody(GenerateBody, ChatFields):
    max_completion_tokens: _Int32 | None = None  # wins over max_tokens, its former name
    logprobs: bool | None = None
    top_logprobs: _Int32 | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(ApiObject):
    """Of a text; without one, a TokenizeChatBody."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None


class TokenizeChatBody(ChatFields):
    model: str | None = None


class DetokenizeBody(ApiObject):
    model: str | None = None
    tokens: _TokenIds


class BatchBody(ApiObject):
    input_file_id: str
    endpoint: Annotated[str, Field(min_length=1)]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None


B = TypeVar("B", bound=ApiObject)


def parse_body(body_class: type[B], data: bytes) -> B:
    """Raises Refusal naming the field, also for a field that this server knows and does not support."""
    try:
        body = body_class.model_validate_json(data)
    except ValidationError as err:
        raise _refusal(err) from err
    for name, value in (body.model_extra or {}).items():
        if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
            raise invalid(f"{name}: is not supported by this server, leave it out; got {_shown(value)}")
    return body


def ignored_fields(body: BaseModel) -> list[str]:
    """Names that a header can hold, of the fields that have no effect."""
    names = (name for name in body.model_extra or {} if name not in _UNSUPPORTED)
    return [name for name in names if _HEADER_WORD.fullmatch(name)][:_MAX_IGNORED]


def _refusal(problem: ValidationError) -> Refusal:
    """The alternatives of a field have an error each: the one is told that came up last."""
    errors = problem.errors(include_url=False, include_context=False)
    error = max(errors, key=lambda error: (len(error["loc"]), *(i for i in error["loc"] if isinstance(i, int))))
    if error["type"] == "json_invalid":
        return invalid(f"request: is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}")
    path = _path(error["loc"])
    if error["type"] == "missing":
        return invalid(f"{path}: is missing")
    if error["type"] == "extra_forbidden":
        return invalid(f"{path}: is not a field")
    words = error["msg"].replace("Input should", "must").replace("String should", "must").replace("Keys should", "must")
    return invalid(f"{path}: {words}, got {_shown(error['input'])}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    """messages[0].content, without the names that pydantic gives to the alternatives of a field."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "list"):
            path += f".{part}" if path else part
    return path or "request"
