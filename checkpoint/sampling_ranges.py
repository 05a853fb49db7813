"""What sampling settings may be, wherever they stand: in a generation_config.json, in a request, in a round."""

from collections.abc import Callable
from dataclasses import dataclass

MAX_LOGPROBS = 20  # as in OpenAI's API


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRange:
    wants: str
    accepts: Callable[[float], bool]  # of the value as fp32 or int32; false for NaN
    is_integer: bool = False


_ZERO_TO_MAX_LOGPROBS = SamplingRange(
    wants=f"in [0, {MAX_LOGPROBS}]", accepts=lambda v: 0 <= v <= MAX_LOGPROBS, is_integer=True
)
_ADDITIVE_PENALTY = SamplingRange(wants="in [-2, 2]", accepts=lambda v: -2 <= v <= 2)

FILE_RANGES = {  # of the settings that a generation_config.json may have, by our names
    "temperature": SamplingRange(wants="finite and >= 0", accepts=lambda v: 0 <= v < float("inf")),
    "top_p": SamplingRange(wants="in (0, 1]", accepts=lambda v: 0 < v <= 1),
    "top_k": SamplingRange(wants=">= 1, or 0 or -1 for off", accepts=lambda v: v >= -1, is_integer=True),
    "min_p": SamplingRange(wants="in [0, 1]", accepts=lambda v: 0 <= v <= 1),
    "repetition_penalty": SamplingRange(wants="finite and > 0", accepts=lambda v: 0 < v < float("inf")),
    "max_tokens": SamplingRange(wants=">= 1", accepts=lambda v: v >= 1, is_integer=True),
}
REQUEST_RANGES = {
    **FILE_RANGES,
    "presence_penalty": _ADDITIVE_PENALTY,
    "frequency_penalty": _ADDITIVE_PENALTY,
    "min_tokens": SamplingRange(wants=">= 0", accepts=lambda v: v >= 0, is_integer=True),
    "logprobs": _ZERO_TO_MAX_LOGPROBS,
    "prompt_logprobs": _ZERO_TO_MAX_LOGPROBS,
    "n": SamplingRange(wants="in [1, 64]", accepts=lambda v: 1 <= v <= 64, is_integer=True),
}
