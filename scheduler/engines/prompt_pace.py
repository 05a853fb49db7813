"""How many tokens of prompts a round may compute, so that it stays far from the time after which its group counts as
lost. How fast an engine is shows only when it computes: a large model on few cores takes minutes for 8192 tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Limits of a round that computes prompts."""

    round_s: float = 10.0  # most seconds that it should take; not measured
    first_tokens: int = 256  # most tokens until one was timed; not measured
    least_tokens: int = 64  # it may always have so many, however slow the engine is; not measured


_TUNING = Tuning()


class PromptPace:
    """Grows with what the fastest rounds promise, and shrinks when a round has taken too long: later chunks of a long
    prompt take longer than the first ones."""

    def __init__(self) -> None:
        self.num_tokens = _TUNING.first_tokens

    def observe(self, num_tokens: int, run_ns: int) -> None:
        """A round with chunks of prompts took this long."""
        fitting = int(num_tokens * _TUNING.round_s * 1e9 / max(1, run_ns))
        if fitting < num_tokens:
            self.num_tokens = max(_TUNING.least_tokens, fitting)
        else:
            self.num_tokens = max(self.num_tokens, fitting)
