"""Where outputs part that should be equal, and how near the two best tokens were there.

Speculation must not change a token. In bf16 a verify step of several rows may round otherwise than a step of one, so
a near tie can fall the other way; a small gap shows such a tie, a large one is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.load import run_side_by_side
from echelon.requests import GenerateOptions
from kernels.gumbel import gumbel_noise

NUM_CANDIDATES = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where two outputs of one prompt part."""

    prompt: Sequence[int]
    output: Sequence[int]  # plain, up to there
    plain_token_id: int
    other_token_id: int


def first_difference(prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]) -> Difference | None:
    for index, (expected, got) in enumerate(zip(plain, other, strict=False)):
        if expected != got:
            return Difference(prompt, plain[:index], expected, got)
    return None


def top_two_gap(address: str, difference: Difference, *, temperature: float, seed: int) -> float:
    """How far plain decoding's best token is ahead of its second best at the place, in units of logits (divided by
    the temperature, noise included, where there is one)."""
    tokens = [*difference.prompt, *difference.output]
    options: GenerateOptions = {"max_tokens": 1, "temperature": 0.0, "logprobs": NUM_CANDIDATES, "ignore_eos": True}
    (completion,) = run_side_by_side(address, [tokens], options).completions
    candidates = completion.samples[0].logprobs[0].top
    scores = torch.tensor([candidate.logprob for candidate in candidates])
    if temperature > 0:
        token_ids = torch.tensor([candidate.token_id for candidate in candidates])
        where = torch.zeros(len(candidates), dtype=torch.int64)
        scores = scores / temperature + gumbel_noise(where + seed, where, where + len(tokens), token_ids)
    best, second = scores.topk(2).values.tolist()
    return float(best - second)
