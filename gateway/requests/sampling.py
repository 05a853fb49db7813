"""Fills in the defaults of a request's sampling settings and checks every value."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoint.json_files import read_optional_json_object
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.refusal import Refusal, invalid

_FROM_GENERATION_CONFIG = {  # generation_config.json's name -> ours
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


# The scheduler compares every character of the output with every stop string, between rounds.
_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024


@dataclass(frozen=True, slots=True)
class _Rule:
    field: str
    wants: str
    accepts: Callable[[float], bool]  # must be false for NaN


_RULES = (
    _Rule("temperature", "finite and >= 0", lambda v: 0 <= v < float("inf")),
    _Rule("top_p", "in (0, 1]", lambda v: 0 < v <= 1),
    _Rule("top_k", ">= 1, or 0 or -1 for off", lambda v: v >= -1),
    _Rule("min_p", "in [0, 1]", lambda v: 0 <= v <= 1),
    _Rule("repetition_penalty", "finite and > 0", lambda v: 0 < v < float("inf")),
    _Rule("presence_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2),
    _Rule("frequency_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2),
    _Rule("max_tokens", ">= 1", lambda v: v >= 1),
    _Rule("min_tokens", ">= 0", lambda v: v >= 0),
    _Rule("logprobs", "in [0, 20]", lambda v: 0 <= v <= 20),
    _Rule("prompt_logprobs", "in [0, 20]", lambda v: 0 <= v <= 20),
    _Rule("n", "in [1, 64]", lambda v: 1 <= v <= 64),
)


def built_in_defaults() -> SamplingParams:
    """The defaults that protos/sampling.proto states, for every field that has one."""
    return SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        min_tokens=0,
        ignore_eos=False,
        n=1,
        skip_special_tokens=True,
        include_stop_str_in_output=False,
    )


def load_sampling_defaults(model_dir: Path) -> SamplingParams:
    """The settings of a request that says nothing, all set but seed, max_tokens, logprobs and prompt_logprobs.

    A value comes from the model's generation_config.json where that file has it (temperature, top_p, top_k, min_p,
    repetition_penalty, and max_new_tokens as the default of max_tokens), else it is the built-in one. `do_sample` is
    ignored, as vLLM does: a request that wants greedy decoding says temperature 0. Raises ValueError naming the file
    and the value when a default is out of range.
    """
    defaults = built_in_defaults()
    path = model_dir / "generation_config.json"
    config = read_optional_json_object(path)
    for theirs, ours in _FROM_GENERATION_CONFIG.items():
        if config.get(theirs) is not None:
            try:
                setattr(defaults, ours, config[theirs])
            except (TypeError, ValueError) as err:
                raise ValueError(f"{path}: {theirs}: {config[theirs]!r} is not a number of the right kind") from err
    try:
        _check_ranges(defaults)
    except Refusal as err:
        raise ValueError(f"{path}: {err.message}") from err
    return defaults


def resolve_sampling(given: SamplingParams, defaults: SamplingParams, *, room: int, vocab_size: int) -> SamplingParams:
    """The settings by which a request runs. `room` is the number of tokens that max_model_len leaves for output.

    Every field is set except logprobs and prompt_logprobs, which stay unset when they were not asked for. The seed is
    drawn here, once, when none was given; max_tokens is at most `room`. Raises Refusal naming the field.
    """
    resolved = SamplingParams()
    resolved.CopyFrom(defaults)
    resolved.MergeFrom(given)
    _check_ranges(resolved)
    _check_collections(resolved, vocab_size)
    resolved.top_k = max(resolved.top_k, 0)
    resolved.max_tokens = min(resolved.max_tokens, room) if resolved.HasField("max_tokens") else room
    if resolved.min_tokens > resolved.max_tokens:
        raise invalid(
            f"sampling.min_tokens: must be at most max_tokens, {resolved.max_tokens} (max_model_len leaves room for "
            f"{room}), got {resolved.min_tokens}"
        )
    if not resolved.HasField("seed"):
        resolved.seed = secrets.randbits(64)
    return resolved


def _check_ranges(sampling: SamplingParams) -> None:
    for rule in _RULES:
        value = getattr(sampling, rule.field)
        if sampling.HasField(rule.field) and not rule.accepts(value):  # type: ignore[arg-type]
            raise invalid(f"sampling.{rule.field}: must be {rule.wants}, got {value:.7g}")


def _check_collections(sampling: SamplingParams, vocab_size: int) -> None:
    if len(sampling.stop) > _MAX_STOPS:
        raise invalid(f"sampling.stop: at most {_MAX_STOPS} strings, got {len(sampling.stop)}")
    for i, stop in enumerate(sampling.stop):
        if not stop:
            raise invalid(f"sampling.stop[{i}]: is empty; leave it out")
        if len(stop) > _MAX_STOP_CHARS:
            raise invalid(f"sampling.stop[{i}]: at most {_MAX_STOP_CHARS} characters, got {len(stop)}")
    for i, token_id in enumerate(sampling.stop_token_ids):
        if not 0 <= token_id < vocab_size:
            raise invalid(f"sampling.stop_token_ids[{i}]: must be in [0, {vocab_size}), got {token_id}")
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            raise invalid(f"sampling.logit_bias: token id must be in [0, {vocab_size}), got {token_id}")
        if not -100 <= bias <= 100:
            raise invalid(f"sampling.logit_bias[{token_id}]: must be in [-100, 100], got {bias:.7g}")
