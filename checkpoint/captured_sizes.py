"""The sizes at which steps are captured as CUDA graphs, and their memory: what the plan expects and the worker
has."""

from collections.abc import Collection
from dataclasses import dataclass

from checkpoint.config import ModelConfig
from checkpoint.memory import forward_bytes

_MOST_TOKENS = 256  # of a captured step. Larger ones keep a device busy for longer than their launches take
_GRAPH_BYTES_PER_LAYER = (
    256 << 10
)  # of the device, for the kernels of a layer; not measured, vLLM reports about as much
_INDEX_BYTES = 8
_BLOCK_ID_BYTES = 4
_LOGIT_BYTES = 4
_LOGIT_COPIES = 3  # the product, the same in fp32, and what a tie with other ranks needs


@dataclass(frozen=True, slots=True, order=True)
class StepSize:
    """Room for `num_seqs` seqs with up to `max_new` new tokens each. What a step does not use is padding."""

    num_seqs: int
    max_new: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.max_new


def step_sizes(max_num_seqs: int, most_new: int) -> list[StepSize]:
    """The sizes to capture, the smallest first; none if most_new is 0."""
    return sorted(
        StepSize(num_seqs, max_new)
        for num_seqs in _up_to(min(max_num_seqs, _MOST_TOKENS))
        for max_new in _up_to(most_new)
        if num_seqs * max_new <= _MOST_TOKENS
    )


def _up_to(most: int) -> list[int]:
    """Powers of two, without one just below `most`, and `most` itself."""
    return [1 << power for power in range(most.bit_length()) if 4 << power <= 3 * most] + [most] * (most > 0)


def fitting(sizes: Collection[StepSize], *, num_seqs: int, most_new: int) -> StepSize | None:
    """The size with the fewest tokens that has room; None: there is none."""
    fit = (size for size in sizes if size.num_seqs >= num_seqs and size.max_new >= most_new)
    return min(fit, key=lambda size: size.num_tokens, default=None)


def captured_bytes(
    config: ModelConfig,
    *,
    num_ranks: int,
    max_num_seqs: int,
    most_new: int,
    max_model_len: int,
    block_size: int,
    value_bytes: int,
    drafts: bool,
) -> int:
    """Bytes on one rank for an engine's captured steps, the tensors that they read and write, and their temporaries,
    which all of them share. `drafts`: steps of chains are captured too. `value_bytes`: of a number of the model."""
    sizes = step_sizes(max_num_seqs, most_new)
    if not sizes:
        return 0
    num_seqs, num_tokens = max(size.num_seqs for size in sizes), max(size.num_tokens for size in sizes)
    num_chains = 2 * len({size.num_seqs for size in sizes}) if drafts else 0
    graphs = (len(sizes) + num_chains) * config.num_layers * _GRAPH_BYTES_PER_LAYER
    table = num_seqs * -(-max_model_len // block_size) * _BLOCK_ID_BYTES
    static = table + 8 * num_tokens * _INDEX_BYTES + num_tokens * config.hidden_size * value_bytes
    temporaries = forward_bytes(config, num_ranks, num_tokens=num_tokens, value_bytes=value_bytes)
    logits = num_seqs * -(-config.vocab_size // num_ranks) * _LOGIT_BYTES * _LOGIT_COPIES if drafts else 0
    return graphs + static + temporaries + logits
