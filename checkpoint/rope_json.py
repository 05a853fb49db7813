"""Reads the RoPE settings of a config.json, in the spelling of transformers 4 (`rope_theta` and `rope_scaling`) and of
transformers 5 (`rope_parameters`)."""

from collections.abc import Callable, Mapping
from typing import Any

from checkpoint.errors import LoadError
from checkpoint.rope import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope, yarn_magnitude

_DEFAULT_THETA = 10_000.0
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_YARN_KEYS = {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


class RopeSettings:
    """The RoPE dictionary of a config.json with what stands beside it. Errors name the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._values = {**(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}
        for key in ("rope_theta", "partial_rotary_factor"):
            self._values.setdefault(key, raw.get(key))
        # Where it stands outside, transformers prefers it to the one in the dictionary.
        outside = raw.get("original_max_position_embeddings")
        self._original_len = outside or self._values.get("original_max_position_embeddings")
        self.max_position_embeddings = int(raw["max_position_embeddings"])
        self.rope_type = str(self._values.get("rope_type") or self._values.get("type") or "default")

    @property
    def theta(self) -> float:
        return self.number("rope_theta", _DEFAULT_THETA)

    @property
    def original_len(self) -> int:
        return int(self._original_len or self.max_position_embeddings)

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; `default` where the key is absent or null."""
        value = self._values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise LoadError(
                f"config.json: rope type {self.rope_type!r} needs {key} to be a positive number, got {value!r}"
            )
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._values.get(key) is None else self.number(key)

    def refuse_unknown(self, known: set[str]) -> None:
        unknown = sorted(key for key, value in self._values.items() if value is not None and key not in known)
        if unknown:
            raise LoadError(
                f"config.json: rope type {self.rope_type!r} has no key {', '.join(unknown)}: known are "
                f"{', '.join(sorted(known))}"
            )
        if self.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise LoadError(
                f"config.json: partial_rotary_factor {self.get('partial_rotary_factor')} (rotation of a part of each "
                f"head) is not supported"
            )


def parse_rope(raw: Mapping[str, Any]) -> Rope:
    """RoPE of a config.json; LoadError for types and keys that are not implemented."""
    settings = RopeSettings(raw)
    if settings.rope_type not in _TYPES:
        raise LoadError(
            f"config.json: rope type {settings.rope_type!r} is not supported; supported are {', '.join(_TYPES)}"
        )
    build, keys = _TYPES[settings.rope_type]
    settings.refuse_unknown(_COMMON_KEYS | keys)
    return build(settings)


def _default(settings: RopeSettings) -> Rope:
    return Rope(theta=settings.theta)


def _linear(settings: RopeSettings) -> Rope:
    return LinearRope(theta=settings.theta, factor=settings.number("factor"))


def _dynamic(settings: RopeSettings) -> Rope:
    return DynamicRope(theta=settings.theta, original_max_position_embeddings=settings.original_len)


def _llama3(settings: RopeSettings) -> Rope:
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if low >= high:
        raise LoadError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")
    return Llama3Rope(
        theta=settings.theta,
        factor=settings.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=settings.original_len,
    )


def _yarn(settings: RopeSettings) -> Rope:
    factor = settings.number("factor", settings.max_position_embeddings / settings.original_len)
    magnitude = settings.optional_number("attention_factor")
    if magnitude is None:
        mscale, mscale_all_dim = settings.optional_number("mscale"), settings.optional_number("mscale_all_dim")
        magnitude = yarn_magnitude(factor, mscale, mscale_all_dim)
    truncate = settings.get("truncate")
    return YarnRope(
        theta=settings.theta,
        factor=factor,
        original_max_position_embeddings=settings.original_len,
        magnitude=magnitude,
        beta_fast=settings.number("beta_fast", 32.0),
        beta_slow=settings.number("beta_slow", 1.0),
        truncate=True if truncate is None else bool(truncate),
    )


_TYPES: dict[str, tuple[Callable[[RopeSettings], Rope], set[str]]] = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "dynamic": (_dynamic, {"factor"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": (_yarn, _YARN_KEYS),
}
