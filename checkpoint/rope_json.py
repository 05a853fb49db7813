"""Reads the RoPE settings of a config.json, in the spelling of transformers 4 (`rope_theta` and `rope_scaling`) and of
transformers 5 (`rope_parameters`)."""

from collections.abc import Callable
from dataclasses import dataclass

from checkpoint.errors import LoadError, shown
from checkpoint.fields import Fields
from checkpoint.rope import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope, yarn_magnitude

_DEFAULT_THETA = 10_000.0
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_YARN_KEYS = {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
# Beyond these no frequency is left that fp32 can tell from another.
_MIN_THETA, _MAX_THETA = 1.001, 1e30
_MAX_FACTOR = 1e6
_MIN_BETA, _MAX_BETA = 1e-3, 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """The RoPE dictionary of a config.json with the keys next to it."""

    fields: Fields
    rope_type: str
    max_position_embeddings: int
    original_len: int

    @property
    def theta(self) -> float:
        return self.fields.number("rope_theta", default=_DEFAULT_THETA, least=_MIN_THETA, most=_MAX_THETA)

    def factor(self, default: float | None = None) -> float:
        return self.fields.number("factor", default=default, least=1.0, most=_MAX_FACTOR)


def parse_rope(config: Fields) -> Rope:
    """RoPE of a config.json; LoadError for types and keys that are not implemented."""
    settings = _read(config)
    if settings.rope_type not in _TYPES:
        raise LoadError(
            f"config.json: rope type {shown(settings.rope_type)} is not supported",
            f"use a model with one of {', '.join(_TYPES)}",
        )
    build, keys = _TYPES[settings.rope_type]
    _refuse_unknown(settings, _COMMON_KEYS | keys)
    return build(settings)


def _read(config: Fields) -> _Settings:
    values = {**(config.part("rope_scaling") or config.part("rope_parameters"))}
    for key in ("rope_theta", "partial_rotary_factor"):
        if values.get(key) is None:
            values[key] = config.get(key)
    key = "original_max_position_embeddings"
    if config.get(key) is not None:  # transformers prefers it to the one in the dictionary
        values[key] = config.get(key)
    fields = Fields(config.file, values)
    max_position_embeddings = config.integer("max_position_embeddings")
    return _Settings(
        fields=fields,
        rope_type=str(values.get("rope_type") or values.get("type") or "default"),
        max_position_embeddings=max_position_embeddings,
        original_len=fields.integer(key, default=max_position_embeddings),
    )


def _refuse_unknown(settings: _Settings, known: set[str]) -> None:
    unknown = [key for key in settings.fields.keys_in_use() if key not in known]
    if unknown:
        raise LoadError(
            f"config.json: rope type {settings.rope_type!r} has no key {shown(unknown[0])}",
            f"known are {', '.join(sorted(known))}",
        )
    if settings.fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        # rotation of a part of each head
        raise settings.fields.unsupported("partial_rotary_factor", "use a model that rotates whole heads")


def _default(settings: _Settings) -> Rope:
    return Rope(theta=settings.theta)


def _linear(settings: _Settings) -> Rope:
    return LinearRope(theta=settings.theta, factor=settings.factor())


def _dynamic(settings: _Settings) -> Rope:
    return DynamicRope(theta=settings.theta, original_max_position_embeddings=settings.original_len)


def _llama3(settings: _Settings) -> Rope:
    low, high = settings.fields.number("low_freq_factor"), settings.fields.number("high_freq_factor")
    if low >= high:
        raise settings.fields.wrong("low_freq_factor", f"below high_freq_factor {high:g}")
    return Llama3Rope(
        theta=settings.theta,
        factor=settings.factor(),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=settings.original_len,
    )


def _yarn(settings: _Settings) -> Rope:
    fields = settings.fields
    if fields.get("factor") is None and settings.original_len > settings.max_position_embeddings:
        wanted = f"at most max_position_embeddings {settings.max_position_embeddings} if there is no factor"
        raise fields.wrong("original_max_position_embeddings", wanted)
    factor = settings.factor(default=settings.max_position_embeddings / settings.original_len)
    magnitude = fields.optional_number("attention_factor")
    if magnitude is None:
        magnitude = yarn_magnitude(factor, fields.optional_number("mscale"), fields.optional_number("mscale_all_dim"))
    slow = fields.number("beta_slow", default=1.0, least=_MIN_BETA, most=_MAX_BETA)
    return YarnRope(
        theta=settings.theta,
        factor=factor,
        original_max_position_embeddings=settings.original_len,
        magnitude=magnitude,
        beta_fast=fields.number("beta_fast", default=32.0, least=slow, most=_MAX_BETA),
        beta_slow=slow,
        truncate=fields.flag("truncate", default=True),
    )


_TYPES: dict[str, tuple[Callable[[_Settings], Rope], set[str]]] = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "dynamic": (_dynamic, {"factor"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": (_yarn, _YARN_KEYS),
}
