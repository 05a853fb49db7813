"""The sampler on kernels makes the same choices as the references in turn."""

import math
import threading

import torch
from torch import Tensor

from kernels.sampling.noise_keys import scale_by_temperature
from kernels.sampling.sample import sample_reference
from kernels.sampling.truncation_threshold import truncation_threshold_reference
from tests.helpers.sampling import SETTINGS, sample_sharded, state
from tests.helpers.thread_group import ThreadGroup, run_ranks
from workers.collectives import SoloGroup
from workers.sampling.rows import RowEntry, SamplingRows
from workers.sampling.sampler import SampledRows, Sampler
from workers.sampling.state import SeqSamplingState

VOCAB_SIZE = 131
BAD_ROW = 6  # a row that asks for logprobs
NAMES = ["plain", "greedy", "top_p", "min_p top_k top_p", "penalties", "bias and mask", "logprobs", "everything"]
CPU = torch.device("cpu")


def states() -> list[SeqSamplingState]:
    return [state(VOCAB_SIZE, output=(1, 9, 9, 2), seed=index, **SETTINGS[name]) for index, name in enumerate(NAMES)]


def rows_on(device: torch.device) -> SamplingRows:
    return SamplingRows.build([RowEntry(item, item.length, ()) for item in states()], device)


def random_logits() -> Tensor:
    return torch.randn(len(NAMES), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


def expected_token_ids(logits: Tensor) -> list[int]:
    rows = rows_on(CPU)
    assert rows.edits is not None
    assert rows.truncation is not None
    assert rows.truncated_rows is not None
    processed = logits.clone()
    rows.edits.apply(processed, 0)
    scaled = scale_by_temperature(processed, rows.temperature)
    thresholds = torch.full((len(NAMES),), -torch.inf)
    thresholds[rows.truncated_rows] = truncation_threshold_reference(scaled[rows.truncated_rows], rows.truncation)
    token_ids: list[int] = sample_reference(processed, rows.temperature, rows.keys, thresholds=thresholds)[1].tolist()
    return token_ids


def check(sampled: SampledRows, logits: Tensor, bad_row: int) -> None:
    expected = expected_token_ids(logits)
    assert sampled.non_finite.nonzero().flatten().tolist() == [bad_row]
    found = sampled.token_ids.tolist()
    assert [found[row] for row in range(len(NAMES)) if row != bad_row] == [
        expected[row] for row in range(len(NAMES)) if row != bad_row
    ]
    assert sampled.logprobs is not None
    last = sampled.logprobs[-1]
    assert last is not None
    exact = logits[-1].double().log_softmax(dim=0)
    best = exact.topk(20)
    assert [entry.token_id for entry in last.top] == best.indices.tolist()
    assert abs(last.chosen.logprob - float(exact[expected[-1]])) < 2e-6
    assert sampled.confidences is not None
    assert sampled.alternatives is not None
    assert abs(float(sampled.confidences[0]) - float(exact_of(logits[0], expected[0]))) < 1e-5
    assert int(sampled.alternatives[1, 0]) == int(logits[1].topk(2).indices[1])  # greedy


def exact_of(logits: Tensor, token_id: int) -> Tensor:
    return logits.double().softmax(dim=0)[token_id]


def test_a_mixed_batch_with_a_bad_row(device: torch.device) -> None:
    logits = random_logits()
    damaged = logits.clone()
    damaged[BAD_ROW, 100] = torch.nan
    sampler = Sampler(SoloGroup(), VOCAB_SIZE)
    sampled = sampler.sample(damaged.to(device), 0, rows_on(device), num_alternatives=2, with_confidence=True)
    check(sampled, logits, bad_row=BAD_ROW)
    assert sampled.logprobs is not None
    void = sampled.logprobs[BAD_ROW]
    assert void is not None
    assert math.isnan(void.chosen.logprob)
    assert all(math.isnan(entry.logprob) and entry.token_id < VOCAB_SIZE for entry in void.top)


def test_prompt_logprobs_with_a_bad_row(device: torch.device) -> None:
    logits = random_logits()[:3]
    exact = logits.double().log_softmax(dim=1)
    logits[1, 5] = torch.inf
    next_token_ids = torch.tensor([3, 4, 130])
    found = Sampler(SoloGroup(), VOCAB_SIZE).prompt_logprobs(logits.to(device), 0, next_token_ids.to(device), 2)
    assert math.isnan(found[1].chosen.logprob)
    for row in (0, 2):
        assert abs(found[row].chosen.logprob - float(exact[row, next_token_ids[row]])) < 2e-6
        assert [entry.token_id for entry in found[row].top] == exact[row].topk(2).indices.tolist()


class TakingTurns:
    """A group whose ranks are threads of one process and run one at a time: the interpreter does not support two
    threads."""

    def __init__(self, group: ThreadGroup, turn: threading.Lock) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._turn = group, turn

    def all_gather(self, x: Tensor) -> Tensor:
        self._turn.release()
        try:
            return self._group.all_gather(x)
        finally:
            self._turn.acquire()

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_gather(x).sum(dim=0, dtype=x.dtype)


def test_shards_choose_what_the_whole_vocabulary_chooses(device: torch.device) -> None:
    logits, rows, turn = random_logits(), rows_on(device), threading.Lock()
    expected = expected_token_ids(logits)

    def run(group: ThreadGroup) -> list[int]:
        with turn:
            token_ids: list[int] = sample_sharded(TakingTurns(group, turn), logits.to(device), rows).token_ids.tolist()
            return token_ids

    assert run_ranks(2, run) == [expected, expected]
