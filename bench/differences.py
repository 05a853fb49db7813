"""Where outputs differ that should be equal, and how close the two tokens were at that point.

Speculation must not change a token. In bf16, a verify step of several rows may round differently from a step of one,
so a near tie can fall the other way. A small gap shows such a tie. A large gap is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.load import run_side_by_side
from echelon.requests import GenerateOptions
from kernels.sampling.gumbel import gumbel_noise


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position at which two outputs of one prompt differ."""

    prompt: Sequence[int]
    output: Sequence[int]  # of plain decoding, before the difference
    plain_token_id: int
    other_token_id: int


def first_difference(prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]) -> Difference | None:
    for index, (expected, got) in enumerate(zip(plain, other, strict=False)):
        if expected != got:
            return Difference(prompt, plain[:index], expected, got)
    return None


def gap_between(address: str, difference: Difference, *, temperature: float, seed: int) -> float:
    """The gap between plain decoding's token and the other one, in logits. Above temperature 0, logits are divided by
    the temperature and include the noise. The two tokens were the best, so this is the gap of the top two."""
    token_ids = [difference.plain_token_id, difference.other_token_id]
    before = [*difference.prompt, *difference.output]
    options: GenerateOptions = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1, "ignore_eos": True}
    scores = []
    for token_id in token_ids:
        (completion,) = run_side_by_side(address, [[*before, token_id]], options).completions
        last = completion.prompt_logprobs[-1]
        assert last is not None, "only position 0 of a prompt has no log-probability"
        scores.append(last.chosen.logprob)
    score = torch.tensor(scores)
    if temperature > 0:
        zeros = torch.zeros(2, dtype=torch.int64)  # sample 0 of the request
        score = score / temperature + gumbel_noise(zeros + seed, zeros, zeros + len(before), torch.tensor(token_ids))
    return float(score[0] - score[1])
