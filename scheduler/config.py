"""What a scheduler is told about its deployment."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.message import Message

from childproc.speculation import DRAFT_MODEL_METHODS
from echelon.pb import process_pb2

_Name = TypeVar("_Name", bound=StrEnum)


class ConfigError(ValueError):
    """A value in the scheduler's spec cannot be used."""


class Method(StrEnum):
    """Where drafts come from."""

    NONE = "none"
    DRAFT_MODEL = "draft_model"
    SUFFIX = "suffix"  # what followed the same tokens before
    HYBRID = "hybrid"  # suffix where it promises more, else the draft model


class Pipeline(StrEnum):
    SERIAL = "serial"  # the target waits while the draft model drafts
    CONTINUOUS = "continuous"  # both run at once


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    method: Method = Method.NONE
    pipeline: Pipeline = Pipeline.SERIAL
    num_speculative_tokens: int = 0  # most drafts that a target row verifies
    adaptive: bool = False  # the policy chooses how many; otherwise all drafts available are verified
    window: int = 0  # continuous: most drafts ahead of the last commit; 0: as many as can be useful
    verdict_cache_rows: int = 0  # continuous: most branches of a seq

    def __post_init__(self) -> None:
        if self.method is not Method.NONE and self.num_speculative_tokens < 1:
            raise ConfigError(f"speculation.num_speculative_tokens must be >= 1 with method {self.method.value!r}")

    @property
    def uses_draft_model(self) -> bool:
        return self.method in DRAFT_MODEL_METHODS

    @property
    def uses_lookup(self) -> bool:
        return self.method in (Method.SUFFIX, Method.HYBRID)

    @classmethod
    def from_spec(cls, spec: process_pb2.SpeculationSpec) -> "SpeculationConfig":
        method = _known(Method, spec.method or "none", "speculation.method")
        if method is Method.NONE:
            return cls()
        pipeline = _known(Pipeline, spec.pipeline or "serial", "speculation.pipeline")
        return cls(**_fields_of(spec) | {"method": method, "pipeline": pipeline})


def _fields_of(section: Message) -> dict[str, Any]:
    """All settings, unset ones too. A section's fields have the names of the config that it becomes."""
    return {field.name: getattr(section, field.name) for field in section.DESCRIPTOR.fields}


def _known(kind: type[_Name], value: str, where: str) -> _Name:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{where} is {value!r}; known are {', '.join(map(repr, map(str, kind)))}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """How KV moves between device, host memory and disk."""

    load_timeout_s: float = 2.0  # for which a seq waits for its blocks; then they are computed
    stores_on_evict: bool = False  # to host memory, what the device evicts; otherwise blocks as they are complete
    writes_disk: bool = True  # False: the disk is only read
    writes_at_once: bool = False  # to disk; otherwise only blocks that were used again or leave host memory
    ignores_prices: bool = False  # fetch what is there even where computing would be faster; for tests

    def __post_init__(self) -> None:
        if not self.load_timeout_s > 0:
            raise ConfigError(f"kv_cache.load_timeout_s must be > 0, got {self.load_timeout_s:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    model_name: str
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    max_queue: int = 1024  # requests that wait for their first round
    enable_prefix_caching: bool = True
    max_rounds_in_flight: int = 2  # at the target
    max_live_slowdown: float = 0.05  # of rounds by background seqs, a share
    keeps_requests: bool = False  # while the target is away, because it is started again
    speculation: SpeculationConfig = SpeculationConfig()
    tiers: TierConfig = TierConfig()

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.max_live_slowdown >= 0:
            raise ConfigError(f"max_live_slowdown must be >= 0, got {self.max_live_slowdown:g}")
        if self.max_rounds_in_flight not in (1, 2):
            raise ConfigError(f"max_rounds_in_flight must be 1 or 2, got {self.max_rounds_in_flight}")

    @classmethod
    def from_spec(cls, spec: process_pb2.SchedulerSpec) -> "SchedulerConfig":
        """The part of a SchedulerSpec that affects decisions."""
        return cls(
            model_name=spec.model_name,
            eos_token_ids=frozenset(spec.eos_token_ids),
            **_fields_of(spec.scheduler),
            max_rounds_in_flight=spec.max_rounds_in_flight,
            max_live_slowdown=spec.max_live_slowdown,
            keeps_requests=spec.keeps_requests,
            speculation=SpeculationConfig.from_spec(spec.speculation),
            tiers=TierConfig(**_fields_of(spec.tiers)) if spec.HasField("tiers") else TierConfig(),
        )
