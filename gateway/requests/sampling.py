"""Fills in the defaults of a request's sampling settings and checks every value."""

import secrets
from pathlib import Path

from checkpoint.generation_config import read_sampling_defaults
from checkpoint.sampling_ranges import REQUEST_RANGES
from childproc.request_limits import MAX_BIAS, MAX_STOP_CHARS, MAX_STOPS
from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.refusal import invalid

_MAX_TOKEN_IDS = 1024  # each costs every round of the request


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
    ignored, as vLLM does: a request that wants greedy decoding says temperature 0. Raises LoadError.
    """
    defaults = built_in_defaults()
    for name, value in read_sampling_defaults(model_dir).items():
        setattr(defaults, name, value)
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
    for name, allowed in REQUEST_RANGES.items():
        value = getattr(sampling, name)
        if sampling.HasField(name) and not allowed.accepts(value):  # type: ignore[arg-type]
            raise invalid(f"sampling.{name}: must be {allowed.wants}, got {value:.10g}")


def _check_collections(sampling: SamplingParams, vocab_size: int) -> None:
    if len(sampling.stop) > MAX_STOPS:
        raise invalid(f"sampling.stop: at most {MAX_STOPS} strings, got {len(sampling.stop)}")
    for i, stop in enumerate(sampling.stop):
        if not stop:
            raise invalid(f"sampling.stop[{i}]: is empty; leave it out")
        if len(stop) > MAX_STOP_CHARS:
            raise invalid(f"sampling.stop[{i}]: at most {MAX_STOP_CHARS} characters, got {len(stop)}")
    for name in ("stop_token_ids", "logit_bias"):
        count = len(getattr(sampling, name))
        if count > _MAX_TOKEN_IDS:
            raise invalid(f"sampling.{name}: at most {_MAX_TOKEN_IDS} tokens, got {count}")
    for i, token_id in enumerate(sampling.stop_token_ids):
        if not 0 <= token_id < vocab_size:
            raise invalid(f"sampling.stop_token_ids[{i}]: must be in [0, {vocab_size}), got {token_id}")
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            raise invalid(f"sampling.logit_bias: token id must be in [0, {vocab_size}), got {token_id}")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise invalid(f"sampling.logit_bias[{token_id}]: must be in [-{MAX_BIAS}, {MAX_BIAS}], got {bias:.10g}")
