"""From Python values to a GenerateRequest, with errors that name the argument."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from echelon.pb import inference_pb2
from echelon.pb.sampling_pb2 import SamplingParams


class ChatMessage(TypedDict):
    """Further keys, such as tool_calls, are for the model's chat template: they must be JSON."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or a conversation."""


class SpeculationOptions(TypedDict, total=False):
    """The fields of protos/inference.proto's Speculation. None is the same as absent: what the deployment says."""

    enabled: bool | None
    num_speculative_tokens: int | None  # fixed number of drafts a round; at most the deployment's
    lower_draft: bool | None  # False: the draft drafts without the level beneath it


class StructuredOutputOptions(TypedDict, total=False):
    """The fields of protos/inference.proto's StructuredOutput: one of them."""

    json_schema: Mapping[str, Any] | str
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]


class SamplingOptions(TypedDict, total=False):
    """The fields of protos/sampling.proto's SamplingParams, which says what they mean. None is the same as absent."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    n: int | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None


class GenerateOptions(SamplingOptions, total=False):
    """Every keyword of `generate`, `chat` and `stream`."""

    request_id: str | None  # chosen by the server when absent
    model: str | None  # checked against the served one
    speculation: SpeculationOptions | None  # of this request; None: as the deployment says
    structured_output: StructuredOutputOptions | None  # a form that the output keeps to
    cache_salt: str | None  # only requests of the same salt share KV cache; at most 256 bytes
    attention: str | None  # "budgeted": the context may be longer than the devices hold; see docs/kv-cache.md
    add_special_tokens: bool | None  # text; True when absent
    add_generation_prompt: bool | None  # conversations; True when absent, False with continue_final_message
    continue_final_message: bool | None  # conversations: the output continues the last message
    chat_template_kwargs: Mapping[str, Any] | None  # conversations: variables of the template, such as tools
    timeout_s: float | None  # for the whole call, the queue included


_SAMPLING_NAMES = tuple(SamplingParams.DESCRIPTOR.fields_by_name)
_SPECULATION_NAMES = tuple(inference_pb2.Speculation.DESCRIPTOR.fields_by_name)
_STRUCTURED_NAMES = tuple(inference_pb2.StructuredOutput.DESCRIPTOR.fields_by_name)
_OTHER_NAMES = tuple(GenerateOptions.__optional_keys__ - SamplingOptions.__optional_keys__)


def build_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The message for one call; `timeout_s` is the caller's business.

    Raises TypeError for an unknown keyword, naming the nearest known one, and TypeError or ValueError naming the
    argument that has the wrong type. Ranges are checked by the server, which knows the model.
    """
    _refuse_unknown(options, (*_SAMPLING_NAMES, *_OTHER_NAMES), what="option")
    request = inference_pb2.GenerateRequest(
        request_id=options.get("request_id") or "", model=options.get("model") or ""
    )
    _set_prompt(request, prompt)
    _set_prompt_options(request, options)
    _set_field(request, "cache_salt", options.get("cache_salt"))
    if (attention := options.get("attention")) is not None:
        request.attention.CopyFrom(inference_pb2.Attention())
        _set_field(request.attention, "mode", attention)
    for name in _SAMPLING_NAMES:
        _set_field(request.sampling, name, options.get(name))
    speculation = options.get("speculation")
    if speculation:
        request.speculation.CopyFrom(build_speculation(speculation))
    structured = options.get("structured_output")
    if structured is not None:
        request.structured_output.CopyFrom(_structured_output(structured))
    return request


def build_speculation(options: SpeculationOptions) -> inference_pb2.Speculation:
    """How a request speculates. Raises TypeError or ValueError naming what is wrong, as `build_request` does."""
    _refuse_unknown(options, _SPECULATION_NAMES, what="speculation option")
    speculation = inference_pb2.Speculation()
    for name, value in options.items():
        _set_field(speculation, name, value)
    return speculation


def _structured_output(options: StructuredOutputOptions) -> inference_pb2.StructuredOutput:
    _refuse_unknown(options, _STRUCTURED_NAMES, what="form of structured output")
    wanted = inference_pb2.StructuredOutput()
    for name, value in options.items():
        if name == "choice":
            _set_field(wanted.choice, "texts", value)
        elif name == "json_schema" and not isinstance(value, str):
            wanted.json_schema = _to_json(value, "structured_output: json_schema")
        else:
            _set_field(wanted, name, value)
    return wanted


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        try:
            request.text = prompt
        except (UnicodeEncodeError, ValueError) as err:
            raise ValueError(f"prompt: is not valid Unicode: {err}") from err
    elif not isinstance(prompt, Sequence):
        raise TypeError(f"prompt: must be text, token ids or chat messages, got {type(prompt).__name__}")
    elif prompt and isinstance(prompt[0], Mapping):
        for i, message in enumerate(prompt):
            _add_chat_message(request.chat, i, message)
    else:
        try:
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]  # the except clause checks it
        except (TypeError, ValueError) as err:
            raise type(err)(f"prompt: token ids must be integers in [0, 2^32): {err}") from err
        request.token_ids.SetInParent()  # an empty list is a prompt that the server refuses by name


def _set_prompt_options(request: inference_pb2.GenerateRequest, options: GenerateOptions) -> None:
    """What only one kind of prompt has."""
    kind = request.WhichOneof("input")
    _set_field(request, "add_special_tokens", options.get("add_special_tokens"))
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        value = options.get(name)
        if value is None:
            continue
        if kind != "chat":
            raise TypeError(f"{name}: is for a conversation, and the prompt is none")
        _set_field(request.chat, name, _to_json(value, name) if name == "chat_template_kwargs" else value)


def _to_json(value: object, name: str) -> str:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: must be a mapping, got {type(value).__name__}")
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as err:
        raise type(err)(f"{name}: must be JSON: {err}") from err


def _add_chat_message(chat: inference_pb2.ChatMessages, i: int, message: Any) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise TypeError(f"prompt[{i}]: a chat message has the keys 'role' and 'content', got {message!r}")
    extra = {key: value for key, value in message.items() if key not in ("role", "content")}
    try:
        added = chat.messages.add(role=message["role"], content=message["content"])
    except (TypeError, ValueError) as err:
        raise type(err)(f"prompt[{i}]: role and content must be text: {err}") from err
    if extra:
        added.extra = _to_json(extra, f"prompt[{i}]")


def _set_field(message: Any, name: str, value: Any) -> None:
    if value is None:
        return
    if name == "stop" and isinstance(value, str):
        value = (value,)
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (AttributeError, TypeError, ValueError) as err:
        raise (ValueError if isinstance(err, ValueError) else TypeError)(f"{name}: {err}") from err


def _refuse_unknown(given: Mapping[str, object], known: Sequence[str], *, what: str) -> None:
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(sorted(known))}"
            raise TypeError(f"unknown {what} {name!r}{hint}")
