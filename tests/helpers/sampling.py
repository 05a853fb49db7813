"""Building blocks of the sampling tests: settings, batches, and logits for which a small error changes the choice."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from echelon.pb.sampling_pb2 import SeqSampling
from workers.collectives import Group, SoloGroup
from workers.sampling.rows import RowEntry, SamplingRows
from workers.sampling.sampler import SampledRows, Sampler
from workers.sampling.state import SeqSamplingState

CPU = torch.device("cpu")
PROMPT = (3, 1, 4, 1, 5)


def seq_sampling(**settings: Any) -> SeqSampling:
    """Temperature 1 and everything else off, except the settings given."""
    neutral = {"seed": 11, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    return SeqSampling(**{**neutral, **settings})


def state(vocab_size: int, output: Sequence[int] = (), **settings: Any) -> SeqSamplingState:
    result = SeqSamplingState(seq_sampling(**settings), PROMPT, vocab_size)
    result.extend(output)
    return result


def rows_of(states: Sequence[SeqSamplingState]) -> SamplingRows:
    """One row for each state, after its history."""
    return SamplingRows.build([RowEntry(item, item.length, ()) for item in states], CPU)


def sample_whole(logits: Tensor, states: Sequence[SeqSamplingState]) -> SampledRows:
    return Sampler(SoloGroup(), logits.shape[1]).sample(logits, 0, rows_of(states))


def shard_of(logits: Tensor, group: Group) -> tuple[Tensor, int]:
    """This rank's columns and the token id of the first. Padding has the largest logits of all."""
    vocab_size = logits.shape[1]
    shard_size = -(-vocab_size // group.size)
    padded = torch.nn.functional.pad(logits, (0, shard_size * group.size - vocab_size), value=1e9)
    start = group.rank * shard_size
    return padded[:, start : start + shard_size].contiguous(), start


def sample_sharded(group: Group, logits: Tensor, rows: SamplingRows) -> SampledRows:
    shard, start = shard_of(logits, group)
    return Sampler(group, logits.shape[1]).sample(shard, start, rows)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_k beyond a shard": {"top_k": 90},
    "top_p": {"top_p": 0.9},
    "tiny top_p": {"top_p": 1e-6},
    "almost everything": {"top_p": 0.999999},
    "min_p": {"min_p": 0.05},
    "min_p top_k top_p": {"min_p": 0.01, "top_k": 40, "top_p": 0.8, "temperature": 1.7},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bias and mask": {"logit_bias": {2: 3.0, 100: -5.0}, "min_tokens": 9, "suppressed_token_ids": [0, 130]},
    "logprobs": {"logprobs": 3},
    "everything": {
        "logprobs": 20,
        "top_k": 60,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.1,
        "logit_bias": {7: 2.0},
    },
}


def _random(num_rows: int, vocab_size: int) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3


LOGITS: dict[str, Callable[[int, int], Tensor]] = {
    "random": _random,
    "flat": lambda num_rows, vocab_size: torch.zeros(num_rows, vocab_size),
    "ties across shards": lambda num_rows, vocab_size: _random(num_rows, vocab_size).div(4).round(),
    "one shard has it all": lambda num_rows, vocab_size: (
        _random(num_rows, vocab_size) + 30.0 * (torch.arange(vocab_size) >= vocab_size * 3 // 4)
    ),
    "descending": lambda num_rows, vocab_size: -torch.arange(vocab_size).mul(0.05).expand(num_rows, -1).contiguous(),
}


def mixed_states(vocab_size: int, copies: int = 2) -> list[SeqSamplingState]:
    """A seq with each kind of settings, with several seeds."""
    return [
        state(vocab_size, output=(1, 9, 9, 2), seed=(1 << 63) + 1000 * copy + index, sample_index=copy, **settings)
        for copy in range(copies)
        for index, settings in enumerate(SETTINGS.values())
    ]
