"""The output has the target's distribution, and its tokens are those of plain decoding, whatever the drafter does.

The rule is from arXiv 2408.07978. Every property comes with engines that break it (negative controls): a test that
passes with those would prove nothing.
"""

from collections.abc import Iterator
from itertools import cycle, repeat
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.sampling.sample import NoiseKeys, sample
from kernels.sampling.truncation import Truncation
from tests.helpers.sampling import sample_whole, state
from tests.helpers.toy_decoding import (
    VOCAB_SIZE,
    ToyEngine,
    chi_squared_p_value,
    law_of_continuations,
    random_table,
    related_table,
)
from workers.collectives import SoloGroup
from workers.sampling.sampler import Sampler

TARGET = random_table(1)
UNRELATED = random_table(2)
DRAFT = related_table(TARGET, UNRELATED, 0.3)
PROMPT = (3, 5)
P_VALUE = 1e-4
FEW_SEQS = 4000
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.8, "frequency_penalty": 0.6}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all three": {"min_p": 0.02, "top_k": 5, "top_p": 0.9, "temperature": 1.5},
    "penalties": PENALTIES,
    "bias and mask": {"logit_bias": {1: 1.5, 6: -1.0}, "min_tokens": 2, "suppressed_token_ids": [0, 4]},
}


class NoiseByStep(ToyEngine):
    def noise_position(self, position: int, depth: int) -> int:
        return depth


class OneNoiseForTwoPositions(ToyEngine):
    def noise_position(self, position: int, depth: int) -> int:
        return position // 2


class RedrawOnMismatch(ToyEngine):
    redraws = True

    def next_token(self, drafts: Any, num_accepted: int, chosen: int, redrawn: int) -> int:
        return redrawn if num_accepted < len(drafts) else chosen


class DraftTokenOnMismatch(ToyEngine):
    def next_token(self, drafts: Any, num_accepted: int, chosen: int, redrawn: int) -> int:
        return drafts[num_accepted] if num_accepted < len(drafts) else chosen


class PenaltiesFromCommittedHistory(ToyEngine):
    def hypothetical(self, drafts: Any) -> Any:
        return ()


class TopPOfEachShard(ToyEngine):
    class sampler_class(Sampler):
        def truncation_thresholds(self, logits: Tensor, temperature: Tensor, truncation: Truncation) -> Tensor:
            return Sampler(SoloGroup(), VOCAB_SIZE).truncation_thresholds(logits, temperature, truncation)


class DraftNoiseOffByOne(ToyEngine):
    def draft_noise_position(self, position: int) -> int:
        return position + 1


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """There are thousands of tiny operators: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# --- law


def p_value_of(engine: ToyEngine, num_seqs: int, settings: dict[str, Any], first_seed: int = 0) -> float:
    """The p-value of the engine's continuations of 3 tokens under the target's law."""
    tokens = engine.decode([PROMPT] * num_seqs, 3, repeat(settings), first_seed=first_seed)
    cells = tokens @ np.array([VOCAB_SIZE**2, VOCAB_SIZE, 1])
    counts = np.bincount(cells, minlength=VOCAB_SIZE**3)
    return chi_squared_p_value(counts, law_of_continuations(TARGET, PROMPT, 3, settings))


@pytest.mark.parametrize("first_seed", [0, 1 << 40, (1 << 64) - 100_000])
def test_the_distribution_is_that_of_the_target(first_seed: int) -> None:
    engine = ToyEngine(TARGET, DRAFT, num_draft_tokens=2)
    assert p_value_of(engine, 30_000, {}, first_seed) > P_VALUE
    assert 0.3 < engine.num_first_matches / engine.num_first_drafts < 0.95  # both outcomes occurred


@pytest.mark.parametrize("name", SETTINGS)
def test_the_distribution_is_right_with_logits_processors(name: str) -> None:
    assert p_value_of(ToyEngine(TARGET, DRAFT, num_draft_tokens=2), FEW_SEQS, SETTINGS[name]) > P_VALUE


def test_samples_of_one_request_have_the_right_distribution() -> None:
    """The samples of a request share a seed and differ in their index."""
    states = [state(VOCAB_SIZE, seed=7, sample_index=index) for index in range(4000)]
    token_ids = sample_whole(TARGET[PROMPT].expand(len(states), -1), states).token_ids
    counts = np.bincount(token_ids.numpy(), minlength=VOCAB_SIZE)
    assert chi_squared_p_value(counts, law_of_continuations(TARGET, PROMPT, 1, {})) > P_VALUE


def test_the_distribution_is_right_under_tensor_parallelism() -> None:
    engine = ToyEngine(TARGET, DRAFT, num_draft_tokens=2, tp_size=2)
    assert p_value_of(engine, FEW_SEQS, SETTINGS["top_p"]) > P_VALUE


@pytest.mark.parametrize(
    ("mutant", "settings"),
    [
        (NoiseByStep, {}),
        (OneNoiseForTwoPositions, {}),
        (RedrawOnMismatch, {}),
        (DraftTokenOnMismatch, {}),
        (PenaltiesFromCommittedHistory, PENALTIES),
    ],
)
def test_the_test_of_the_distribution_catches_wrong_engines(mutant: type[ToyEngine], settings: dict[str, Any]) -> None:
    assert p_value_of(mutant(TARGET, DRAFT, num_draft_tokens=2), FEW_SEQS, settings) < P_VALUE


def test_the_test_of_the_distribution_catches_top_p_within_shards() -> None:
    assert p_value_of(TopPOfEachShard(TARGET, DRAFT, num_draft_tokens=2, tp_size=2), FEW_SEQS, {"top_p": 0.8}) < P_VALUE


def test_the_test_of_the_distribution_cannot_see_shifted_draft_noise() -> None:
    """That mistake only lowers acceptance: the test of acceptance below must see it."""
    assert p_value_of(DraftNoiseOffByOne(TARGET, DRAFT, num_draft_tokens=2), FEW_SEQS, {}) > P_VALUE


# --- a flat vocabulary of 128k


def flat_draws(num_draws: int, vocab_size: int = 128_256) -> Tensor:
    keys = NoiseKeys(
        seeds=torch.arange(num_draws) * 7919,
        sample_indices=torch.zeros(num_draws, dtype=torch.int64),
        positions=torch.arange(num_draws) % 97,
    )
    temperature = torch.ones(num_draws)
    chosen = []
    for rows in torch.arange(num_draws).split(8):
        logits = torch.zeros(len(rows), vocab_size)
        chosen.append(sample(logits, temperature[rows], keys.select(rows))[1])
    return torch.cat(chosen)


def test_flat_vocabulary_is_drawn_evenly() -> None:
    token_ids = flat_draws(320)
    for buckets in (token_ids * 16 // 128_256, token_ids % 16):
        counts = np.bincount(buckets.numpy(), minlength=16)
        assert chi_squared_p_value(counts, np.full(16, 1 / 16)) > P_VALUE
    assert len(token_ids.unique()) > 315


# --- equality with plain decoding


PROMPTS = [(a, b) for a in range(VOCAB_SIZE) for b in range(VOCAB_SIZE)]
DRAFTS = {"related": DRAFT, "unrelated": UNRELATED, "the target itself": TARGET, "contrary": -TARGET}
STREAMS = {**SETTINGS, "greedy": {"temperature": 0.0}, "greedy penalties": {"temperature": 0.0, **PENALTIES}}
# One batch with seqs of all settings in turn.
MIXED_PROMPTS = [prompt for prompt in PROMPTS[::2] for _ in STREAMS]
NUM_TOKENS = 10


def decode_mixed(engine: ToyEngine) -> dict[str, list[list[int]]]:
    tokens = engine.decode(MIXED_PROMPTS, NUM_TOKENS, cycle(STREAMS.values()))
    return {name: tokens[index :: len(STREAMS)].tolist() for index, name in enumerate(STREAMS)}


@pytest.fixture(scope="module")
def plain_streams() -> dict[str, list[list[int]]]:
    return decode_mixed(ToyEngine(TARGET, TARGET, num_draft_tokens=0))


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_equal_those_of_plain_decoding(
    draft: str, num_draft_tokens: int, plain_streams: dict[str, list[list[int]]]
) -> None:
    assert decode_mixed(ToyEngine(TARGET, DRAFTS[draft], num_draft_tokens=num_draft_tokens)) == plain_streams


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tokens_do_not_depend_on_shards(tp_size: int, plain_streams: dict[str, list[list[int]]]) -> None:
    assert decode_mixed(ToyEngine(TARGET, DRAFT, num_draft_tokens=3, tp_size=tp_size)) == plain_streams


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (NoiseByStep, "plain"),
        (RedrawOnMismatch, "plain"),
        (DraftTokenOnMismatch, "plain"),
        (DraftTokenOnMismatch, "greedy"),
        (PenaltiesFromCommittedHistory, "penalties"),
        (PenaltiesFromCommittedHistory, "greedy penalties"),
    ],
)
def test_the_test_of_equality_catches_wrong_engines(
    mutant: type[ToyEngine], name: str, plain_streams: dict[str, list[list[int]]]
) -> None:
    assert decode_mixed(mutant(TARGET, DRAFT, num_draft_tokens=3))[name] != plain_streams[name]


# --- acceptance


COPIES = 60  # of every context


def first_match_rate(engine: ToyEngine, copies: int) -> float:
    """The share of first drafts that the target confirms, over all contexts of two tokens."""
    engine.decode(PROMPTS * copies, 1, repeat({}))
    assert engine.num_first_drafts == copies * len(PROMPTS)
    return engine.num_first_matches / engine.num_first_drafts


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_drafts_match_as_often_as_shared_noise_promises(share: float) -> None:
    """The rate lies between the proven bound (1 - TV) / (1 + TV) and maximal coupling, 1 - TV."""
    draft = related_table(TARGET, UNRELATED, share)
    distance = (TARGET.softmax(dim=2) - draft.softmax(dim=2)).abs().sum(dim=2) / 2
    rate = first_match_rate(ToyEngine(TARGET, draft, num_draft_tokens=1), COPIES)
    tolerance = 4 * 0.5 / np.sqrt(COPIES * len(PROMPTS))
    assert float(((1 - distance) / (1 + distance)).mean()) - tolerance < rate
    assert rate < float((1 - distance).mean()) + tolerance


def test_the_acceptance_rate_reveals_shifted_draft_noise() -> None:
    distance = (TARGET.softmax(dim=2) - DRAFT.softmax(dim=2)).abs().sum(dim=2) / 2
    rate = first_match_rate(DraftNoiseOffByOne(TARGET, DRAFT, num_draft_tokens=1), COPIES)
    assert rate < float(((1 - distance) / (1 + distance)).mean()) - 0.05
