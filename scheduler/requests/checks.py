"""What a Submit may contain. The gateway has checked it for its client; the owner of the state checks it again."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from echelon.pb import sampling_pb2, scheduler_pb2

_MAX_REQUEST_ID_CHARS = 128
_MAX_CACHE_SALT_BYTES = 256
# Every character of the output is compared with every stop string between rounds.
_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024


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


@dataclass(frozen=True, slots=True)
class _Rule:
    field: str
    wants: str
    accepts: Callable[[float], bool]  # must be false for NaN


_RULES = (
    _Rule("temperature", "finite and >= 0", lambda v: 0 <= v < math.inf),
    _Rule("top_p", "in (0, 1]", lambda v: 0 < v <= 1),
    _Rule("top_k", ">= 0", lambda v: v >= 0),
    _Rule("min_p", "in [0, 1]", lambda v: 0 <= v <= 1),
    _Rule("repetition_penalty", "finite and > 0", lambda v: 0 < v < math.inf),
    _Rule("presence_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2),
    _Rule("frequency_penalty", "in [-2, 2]", lambda v: -2 <= v <= 2),
    _Rule("max_tokens", ">= 1", lambda v: v >= 1),
    _Rule("min_tokens", ">= 0", lambda v: v >= 0),
    _Rule("logprobs", "in [0, 20]", lambda v: 0 <= v <= 20),
    _Rule("prompt_logprobs", "in [0, 20]", lambda v: 0 <= v <= 20),
    _Rule("n", "in [1, 64]", lambda v: 1 <= v <= 64),
)


def check_submit(submit: scheduler_pb2.Submit, *, max_model_len: int, vocab_size: int) -> None:
    """Raises InvalidRequestError for what a correct gateway does not send. The prompt's ids are left to
    `check_token_ids`, which is five times as fast because it works on a list."""
    if not 1 <= len(submit.request_id) <= _MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError(
            f"request_id must have 1 to {_MAX_REQUEST_ID_CHARS} characters, got {len(submit.request_id)}"
        )
    if (num_bytes := len(submit.cache_salt.encode())) > _MAX_CACHE_SALT_BYTES:
        raise InvalidRequestError(f"cache_salt must have at most {_MAX_CACHE_SALT_BYTES} bytes, got {num_bytes}")
    if math.isnan(submit.timeout_s):
        raise InvalidRequestError("timeout_s must be a number of seconds, got nan")
    for field in _RESOLVED:
        if not submit.sampling.HasField(field):
            raise InvalidRequestError(f"sampling.{field} is not set: the gateway fills in every default")
    for rule in _RULES:
        value = getattr(submit.sampling, rule.field)
        if submit.sampling.HasField(rule.field) and not rule.accepts(value):  # type: ignore[arg-type]
            raise InvalidRequestError(f"sampling.{rule.field} must be {rule.wants}, got {value:.7g}")
    _check_prompt_len(submit, max_model_len)
    _check_collections(submit.sampling, vocab_size)


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
    if len(sampling.stop) > _MAX_STOPS:
        raise InvalidRequestError(f"sampling.stop: at most {_MAX_STOPS} strings, got {len(sampling.stop)}")
    longest = max(map(len, sampling.stop), default=0)
    if longest > _MAX_STOP_CHARS:
        raise InvalidRequestError(f"sampling.stop: at most {_MAX_STOP_CHARS} characters a string, got {longest}")
    for field, token_ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        if len(token_ids) > vocab_size:
            raise InvalidRequestError(f"sampling.{field}: at most {vocab_size} tokens, got {len(token_ids)}")
        check_token_ids(token_ids, vocab_size, f"sampling.{field}")
    for token_id, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            raise InvalidRequestError(f"sampling.logit_bias[{token_id}] must be in [-100, 100], got {bias:.7g}")


def check_token_ids(token_ids: Collection[int], vocab_size: int, where: str) -> None:
    """Raises InvalidRequestError for an id outside the vocabulary."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"{where}: token id {token_id} is outside the vocabulary of {vocab_size}")
