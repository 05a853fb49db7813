"""The rule of docs/sampling.md, which every stream must follow, written as simply as possible.

Logits come from a single forward over the whole stream in one process: no draft, batch, chunk or other rank is
involved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.sampling.gumbel import gumbel_noise_range
from tests.helpers.paged import PagedRunner
from workers.models.decoder import CausalLM


class TokenRule:
    """Judges the streams of an fp32 model. Settings are keyword arguments of SamplingParams."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def lags(self, prompt: Sequence[int], output: Sequence[int], settings: Mapping[str, Any]) -> Tensor:
        """How far each candidate for each output token is below the best one, after the output before it: fp64
        [len(output), vocab_size]. The right token has 0; one that the settings exclude has infinity."""
        runner = PagedRunner(self._model, num_seqs=1, max_len=len(prompt) + len(output), dtype=torch.float32)
        logits = runner.step({0: [*prompt, *output[:-1]]})[0][len(prompt) - 1 :].double()
        for depth, row in enumerate(logits):
            _penalise(row, prompt, output[:depth], settings)
        temperature = settings.get("temperature", 1.0)
        if temperature > 0:
            logits /= temperature
            for row in logits:
                row[~_kept(row, settings)] = -torch.inf
            logits += _noise(settings["seed"], first=len(prompt), count=len(output), vocab_size=logits.shape[1])
        return logits.amax(dim=1, keepdim=True) - logits


def _penalise(logits: Tensor, prompt: Sequence[int], output: Sequence[int], settings: Mapping[str, Any]) -> None:
    for token_id in {*prompt, *output}:
        factor = settings.get("repetition_penalty", 1.0)
        logits[token_id] *= 1 / factor if logits[token_id] > 0 else factor
    for token_id in output:
        logits[token_id] -= settings.get("frequency_penalty", 0.0)
    for token_id in set(output):
        logits[token_id] -= settings.get("presence_penalty", 0.0)
    for token_id, bias in settings.get("logit_bias", {}).items():
        logits[token_id] += bias


def _kept(scaled: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Which tokens min-p, top-k and top-p leave when applied in this order: bool [vocab_size]."""
    probabilities = scaled.softmax(dim=0)
    kept = probabilities >= settings.get("min_p", 0.0) * probabilities.max()
    if top_k := settings.get("top_k", 0):
        kept &= probabilities >= probabilities.sort(descending=True).values[top_k - 1]
    ranked = (probabilities * kept).sort(descending=True).values
    # The fewest tokens that reach the mass: those before which the sum is still below it.
    wanted = (ranked.cumsum(dim=0) - ranked < settings.get("top_p", 1.0) * ranked.sum()) & (ranked > 0)
    return kept & (probabilities >= ranked[wanted].min())


def _noise(seed: int, *, first: int, count: int, vocab_size: int) -> Tensor:
    """The noise at positions first to first + count - 1 of sample 0: [count, vocab_size]."""
    positions = torch.arange(first, first + count)
    return gumbel_noise_range(
        torch.full_like(positions, seed),
        torch.zeros_like(positions),
        positions,
        first_token_id=0,
        num_tokens=vocab_size,
    )
