"""What a scheduler is told about its deployment."""

from dataclasses import dataclass

from echelon.pb import process_pb2

__all__ = ["ConfigError", "SchedulerConfig"]


class ConfigError(ValueError):
    """A value in the scheduler's spec cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    model_name: str
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    max_queue: int = 1024  # requests that wait for their first round
    enable_prefix_caching: bool = True
    max_rounds_in_flight: int = 2  # at each engine
    num_speculative_tokens: int = 0  # most drafts a round and seq; 0: no speculation

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.max_rounds_in_flight not in (1, 2):
            raise ConfigError(f"max_rounds_in_flight must be 1 or 2, got {self.max_rounds_in_flight}")

    @classmethod
    def from_spec(cls, spec: process_pb2.SchedulerSpec) -> "SchedulerConfig":
        """The part of a SchedulerSpec that decisions depend on."""
        return cls(
            model_name=spec.model_name,
            eos_token_ids=frozenset(spec.eos_token_ids),
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_model_len=spec.max_model_len,
            max_queue=spec.max_queue,
            enable_prefix_caching=spec.enable_prefix_caching,
            max_rounds_in_flight=spec.max_rounds_in_flight,
            num_speculative_tokens=_num_speculative_tokens(spec.speculation),
        )


def _num_speculative_tokens(spec: process_pb2.SpeculationSpec) -> int:
    if spec.method in ("", "none"):
        return 0
    if spec.method != "draft_model":
        raise ConfigError(f"speculation.method is {spec.method!r}; known are 'none' and 'draft_model'")
    if spec.pipeline not in ("", "serial"):
        raise ConfigError(f"speculation.pipeline is {spec.pipeline!r}; known is 'serial'")
    if spec.num_speculative_tokens < 1:
        raise ConfigError("speculation.num_speculative_tokens must be >= 1 with method 'draft_model'")
    return spec.num_speculative_tokens
