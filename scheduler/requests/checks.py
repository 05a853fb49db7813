"""What a Submit may contain. The gateway has checked it for its client; the owner of the state checks it again."""

import math
from collections.abc import Collection
from typing import Literal

from checkpoint.sampling_ranges import REQUEST_RANGES, SamplingRange
from childproc.request_limits import (
    MAX_BIAS,
    MAX_CACHE_SALT_BYTES,
    MAX_GRAMMAR_BYTES,
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_CHARS,
    MAX_STOPS,
)
from echelon.pb import sampling_pb2, scheduler_pb2


class InvalidRequestError(ValueError):
    """A request that can never be served; the message names the field."""


# Sampling settings whose default is not zero: a Submit that leaves them unset would mean something else.
_RESOLVED: tuple[Literal["temperature", "top_p", "repetition_penalty", "n", "skip_special_tokens"], ...] = (
    "temperature",
    "top_p",
    "repetition_penalty",
    "n",
    "skip_special_tokens",
)


# The gateway has replaced -1.
_RANGES = {**REQUEST_RANGES, "top_k": SamplingRange(wants=">= 0", accepts=lambda v: v >= 0, is_integer=True)}


def check_submit(submit: scheduler_pb2.Submit, *, max_model_len: int, vocab_size: int) -> None:
    """Raises InvalidRequestError for what a correct gateway does not send. The prompt's ids are left to
    `check_token_ids`, which is five times as fast because it works on a list."""
    if not 1 <= len(submit.request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError(
            f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters, got {len(submit.request_id)}"
        )
    if (num_bytes := len(submit.cache_salt.encode())) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequestError(f"cache_salt must have at most {MAX_CACHE_SALT_BYTES} bytes, got {num_bytes}")
    if math.isnan(submit.timeout_s):
        raise InvalidRequestError("timeout_s must be a number of seconds, got nan")
    for field in _RESOLVED:
        if not submit.sampling.HasField(field):
            raise InvalidRequestError(f"sampling.{field} is not set: the gateway fills in every default")
    for name, allowed in _RANGES.items():
        value = getattr(submit.sampling, name)
        if submit.sampling.HasField(name) and not allowed.accepts(value):  # type: ignore[arg-type]
            raise InvalidRequestError(f"sampling.{name} must be {allowed.wants}, got {value:.10g}")
    _check_prompt_len(submit, max_model_len)
    _check_collections(submit.sampling, vocab_size)


def check_grammar(submit: scheduler_pb2.Submit, eos_token_ids: Collection[int]) -> None:
    """Raises InvalidRequestError for a grammar that no engine could keep to; its source is not read here."""
    if not submit.grammar:
        return
    if (num_bytes := len(submit.grammar.encode())) > MAX_GRAMMAR_BYTES:
        raise InvalidRequestError(f"grammar must have at most {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}")
    if not eos_token_ids:
        raise InvalidRequestError("grammar needs a model with an EOS token, to end the output")
    if submit.sampling.ignore_eos:
        raise InvalidRequestError("sampling.ignore_eos must be false with a grammar, which ends the output with EOS")


def _check_prompt_len(submit: scheduler_pb2.Submit, max_model_len: int) -> None:
    num_prompt = len(submit.prompt_token_ids)
    if num_prompt == 0:
        raise InvalidRequestError("prompt_token_ids is empty: a prompt needs at least one token")
    if num_prompt >= max_model_len:
        raise InvalidRequestError(
            f"prompt_token_ids has {num_prompt} tokens, which leaves no room to generate within max_model_len "
            f"{max_model_len}: shorten the prompt"
        )


def _check_collections(sampling: sampling_pb2.SamplingParams, vocab_size: int) -> None:
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidRequestError(f"sampling.stop: at most {MAX_STOPS} strings, got {len(sampling.stop)}")
    longest = max(map(len, sampling.stop), default=0)
    if longest > MAX_STOP_CHARS:
        raise InvalidRequestError(f"sampling.stop: at most {MAX_STOP_CHARS} characters a string, got {longest}")
    for field, token_ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        if len(token_ids) > vocab_size:
            raise InvalidRequestError(f"sampling.{field}: at most {vocab_size} tokens, got {len(token_ids)}")
        check_token_ids(token_ids, vocab_size, f"sampling.{field}")
    for token_id, bias in sampling.logit_bias.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequestError(
                f"sampling.logit_bias[{token_id}] must be in [-{MAX_BIAS}, {MAX_BIAS}], got {bias:.10g}"
            )


def check_token_ids(token_ids: Collection[int], vocab_size: int, where: str) -> None:
    """Raises InvalidRequestError for an id outside the vocabulary."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"{where}: token id {token_id} is outside the vocabulary of {vocab_size}")
