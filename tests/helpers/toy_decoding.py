"""Speculative decoding of many seqs at once, with tables as models, through the engine's own sampling code.

The models are Markov chains of order 2 over a handful of tokens, so the chain rule gives the law of a continuation.
Whatever a mutation of the engine would change is a method of `ToyEngine`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling.sample import NoiseKeys
from kernels.sampling.verify_chain import verify_chain
from tests.helpers.sampling import CPU, seq_sampling, shard_of
from tests.helpers.thread_group import run_ranks
from workers.collectives import Group, SoloGroup
from workers.sampling.rows import RowEntry, SamplingRows
from workers.sampling.sampler import Sampler
from workers.sampling.state import SeqSamplingState

VOCAB_SIZE = 8
Settings = dict[str, Any]  # of one seq; settings left out are neutral


def random_table(seed: int) -> Tensor:
    """Logits, fp32 [V, V, V], of a chain of order 2 whose rows are draws from Dirichlet(0.3)."""
    probabilities = np.random.default_rng(seed).dirichlet([0.3] * VOCAB_SIZE, size=(VOCAB_SIZE, VOCAB_SIZE))
    return torch.from_numpy(np.log(probabilities + 1e-9)).float()


def related_table(table: Tensor, other: Tensor, share: float) -> Tensor:
    """The mixture of two chains, with the share `share` of the second."""
    return torch.log((1 - share) * table.softmax(dim=2) + share * other.softmax(dim=2))


class ToyEngine:
    """A target, a draft, and `num_draft_tokens` drafts per verification."""

    sampler_class = Sampler
    redraws = False  # whether next_token wants a second draw, which costs as much as the first

    def __init__(self, target: Tensor, draft: Tensor, *, num_draft_tokens: int, tp_size: int = 1) -> None:
        self.target = target
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self.tp_size = tp_size
        self.num_first_drafts = 0  # first drafts of chains that were compared; next, those that matched
        self.num_first_matches = 0

    # What mutations override.

    def noise_position(self, position: int, depth: int) -> int:
        return position

    def draft_noise_position(self, position: int) -> int:
        return position

    def hypothetical(self, drafts: Sequence[int]) -> Sequence[int]:
        return drafts

    def next_token(self, drafts: Sequence[int], num_accepted: int, chosen: int, redrawn: int) -> int:
        return chosen

    # The engine.

    def decode(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, settings: Iterable[Settings], *, first_seed: int = 0
    ) -> NDArray[np.int64]:
        """Continuations [num_seqs, num_tokens] of prompts of at least 2 tokens, in one batch, with consecutive
        seeds."""
        seqs = [
            SeqSamplingState(seq_sampling(**{"seed": first_seed + index, **own}), prompt, VOCAB_SIZE)
            for index, (prompt, own) in enumerate(zip(prompts, settings, strict=False))
        ]
        histories = [list(prompt) for prompt in prompts]
        lengths = [len(prompt) + num_tokens for prompt in prompts]
        live = list(range(len(prompts)))
        while live:
            self._round([seqs[index] for index in live], [histories[index] for index in live])
            live = [index for index in live if len(histories[index]) < lengths[index]]
        return np.array(
            [history[len(prompt) :][:num_tokens] for history, prompt in zip(histories, prompts, strict=True)]
        )

    def _round(self, seqs: list[SeqSamplingState], histories: list[list[int]]) -> None:
        drafts: list[list[int]] = [[] for _ in seqs]
        for depth in range(self.num_draft_tokens):
            entries = [RowEntry(seq, seq.length + depth, chain) for seq, chain in zip(seqs, drafts, strict=True)]
            contexts = [history + chain for history, chain in zip(histories, drafts, strict=True)]
            positions = [self.draft_noise_position(entry.position) for entry in entries]
            chosen = self._choose(logits_behind(self.draft, contexts), entries, positions)
            drafts = [[*chain, token_id] for chain, token_id in zip(drafts, chosen.tolist(), strict=True)]
        self._verify(seqs, histories, drafts)

    def _verify(self, seqs: list[SeqSamplingState], histories: list[list[int]], drafts: list[list[int]]) -> None:
        entries, contexts, positions, draft_ids = [], [], [], []
        for seq, history, chain in zip(seqs, histories, drafts, strict=True):
            for depth in range(len(chain) + 1):
                hypothetical = self.hypothetical(chain[:depth])
                entries.append(RowEntry(seq, seq.length + len(hypothetical), hypothetical))
                contexts.append((history + chain[:depth])[-2:])
                positions.append(self.noise_position(seq.length + depth, depth))
            draft_ids += [*chain, -1]
        logits = logits_behind(self.target, contexts)
        chosen = self._choose(logits, entries, positions)
        again = [position + 1_000_003 for position in positions]
        redrawn = self._choose(logits, entries, again) if self.redraws else chosen
        cu_rows = [0, *accumulate(len(chain) + 1 for chain in drafts)]
        num_accepted, next_ids = verify_chain(chosen, torch.tensor(draft_ids), torch.tensor(cu_rows))
        stops = torch.tensor(cu_rows[:-1]) + num_accepted
        verdicts = zip(num_accepted.tolist(), next_ids.tolist(), redrawn[stops].tolist(), strict=True)
        for seq, history, chain, (accepted, token_id, other) in zip(seqs, histories, drafts, verdicts, strict=True):
            committed = [*chain[:accepted], self.next_token(chain, accepted, token_id, other)]
            history += committed
            seq.extend(committed)
            self.num_first_drafts += bool(chain)
            self.num_first_matches += accepted > 0

    def _choose(self, logits: Tensor, entries: list[RowEntry], positions: list[int]) -> Tensor:
        rows = SamplingRows.build(entries, CPU)
        keys = NoiseKeys(
            seeds=rows.keys.seeds, sample_indices=rows.keys.sample_indices, positions=torch.tensor(positions)
        )
        rows = replace(rows, keys=keys)

        def choose(group: Group) -> Tensor:
            shard, start = shard_of(logits, group)
            return self.sampler_class(group, VOCAB_SIZE).sample(shard, start, rows).token_ids

        return choose(SoloGroup()) if self.tp_size == 1 else run_ranks(self.tp_size, choose)[0]


def logits_behind(table: Tensor, contexts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [num_contexts, V] after token sequences."""
    return table[[context[-2] for context in contexts], [context[-1] for context in contexts]]


def distribution(logits: NDArray[np.float64], prompt: Sequence[int], output: Sequence[int], settings: Settings) -> Any:
    """Probabilities [V] of the next token in fp64, by the definitions of the processors."""
    x = logits.copy()
    for token_id in range(len(x)):
        count = list(output).count(token_id)
        if count or token_id in prompt:
            penalty = settings.get("repetition_penalty", 1.0)
            x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
        x[token_id] -= settings.get("frequency_penalty", 0.0) * count
        x[token_id] -= settings.get("presence_penalty", 0.0) * (count > 0)
    for token_id, bias in settings.get("logit_bias", {}).items():
        x[token_id] += bias
    if len(output) < settings.get("min_tokens", 0):
        x[settings["suppressed_token_ids"]] = -np.inf
    x = x / settings.get("temperature", 1.0)
    p = np.exp(x - x.max())
    p[p < settings.get("min_p", 0.0)] = 0  # relative to the largest, which is 1
    if settings.get("top_k"):
        p[p < np.sort(p)[::-1][settings["top_k"] - 1]] = 0
    if settings.get("top_p", 1.0) < 1:
        descending = np.sort(p)[::-1]
        p[p < descending[np.searchsorted(descending.cumsum() / p.sum(), settings["top_p"])]] = 0
    return p / p.sum()


def law_of_continuations(
    table: Tensor, prompt: Sequence[int], num_tokens: int, settings: Settings
) -> NDArray[np.float64]:
    """The probability of every continuation by the chain rule: [V ** num_tokens]."""
    logits = table.double().numpy()
    law = []
    for continuation in product(range(VOCAB_SIZE), repeat=num_tokens):
        probability = 1.0
        for depth, token_id in enumerate(continuation):
            context = [*prompt, *continuation[:depth]]
            if probability:
                here = distribution(logits[context[-2], context[-1]], prompt, continuation[:depth], settings)
                probability *= float(here[token_id])
        law.append(probability)
    return np.array(law)


def chi_squared_p_value(counts: NDArray[np.int64], law: NDArray[np.float64]) -> float:
    """The p-value of counts under a law; cells with fewer than 5 expected counts are pooled."""
    expected = law * counts.sum()
    rare = expected < 5
    found = np.append(counts[~rare], counts[rare].sum()).astype(float)
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:  # the pool itself is too rare: it joins the smallest cell
        smallest = int(expected[:-1].argmin())
        found[smallest] += found[-1]
        expected[smallest] += expected[-1]
        found, expected = found[:-1], expected[:-1]
    statistic = float(((found - expected) ** 2 / expected).sum())
    half_degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
