"""The sampler as an engine uses it: mixed batches, processors, logprobs, bad logits, shards."""

import math
from typing import Any

import pytest
import torch

from kernels.sampling.sample import sample
from kernels.sampling.truncation_threshold import truncation_threshold
from tests.helpers.sampling import (
    CPU,
    LOGITS,
    PROMPT,
    SETTINGS,
    mixed_states,
    rows_of,
    sample_sharded,
    sample_whole,
    seq_sampling,
    shard_of,
    state,
)
from tests.helpers.thread_group import run_ranks
from workers.collectives import SoloGroup
from workers.sampling.rows import RowEntry, SamplingRows
from workers.sampling.sampler import SampledRows, Sampler
from workers.sampling.state import SeqSamplingState

VOCAB_SIZE = 131


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(logits: torch.Tensor, num_draws: int = 400, **settings: Any) -> set[int]:
    """Tokens drawn from one row with many seeds."""
    states = [state(VOCAB_SIZE, seed=seed, **settings) for seed in range(num_draws)]
    return set(sample_whole(logits.expand(num_draws, -1), states).token_ids.tolist())


def as_tuple(sampled: SampledRows) -> tuple[list[int], list[bool], list[bytes]]:
    logprobs = [entry.SerializeToString() if entry else b"" for entry in sampled.logprobs or ()]
    return sampled.token_ids.tolist(), sampled.non_finite.tolist(), logprobs


# --- choice


def test_greedy_takes_the_lowest_id_of_the_best() -> None:
    logits = random_logits(1)
    logits[0, [17, 90]] = 50.0
    assert drawn(logits, 3, temperature=0.0) == {17}
    assert drawn(logits, 3, temperature=1e-6) == {17}


def test_seed_sample_index_and_position_each_change_the_draw() -> None:
    base = {"seed": 5, "sample_index": 0}
    logits = torch.zeros(1, VOCAB_SIZE).expand(5, -1)
    states = [state(VOCAB_SIZE, **settings) for settings in (base, base, {"seed": 6}, {"seed": 5, "sample_index": 1})]
    states.append(state(VOCAB_SIZE, output=[7], **base))
    token_ids = sample_whole(logits, states).token_ids.tolist()
    assert token_ids[0] == token_ids[1]
    assert len(set(token_ids)) == 4


def test_all_64_bits_of_a_seed_count() -> None:
    seeds = [1, 1 + (1 << 32), 1 + (1 << 63), (1 << 64) - 1]
    token_ids = sample_whole(torch.zeros(4, 5000), [state(5000, seed=seed) for seed in seeds]).token_ids
    assert len(set(token_ids.tolist())) == 4


def test_truncation_reaches_the_draw() -> None:
    logits = torch.full((1, VOCAB_SIZE), -2.0)
    logits[0, [5, 6, 7, 8]] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    assert drawn(logits, top_k=2) == {5, 6}
    assert drawn(logits, min_p=0.85) == {5, 6}
    assert drawn(logits, top_p=0.19) == {5, 6}
    assert drawn(logits, top_k=4, top_p=0.75) == {5, 6, 7}
    assert drawn(logits, temperature=0.01) == {5}
    assert len(drawn(logits)) > 20


def test_logits_processors_run_in_order() -> None:
    """Bias and mask come before top-k, temperature before min-p."""
    logits = torch.full((1, VOCAB_SIZE), -30.0)
    logits[0, [5, 6, 7]] = torch.tensor([2.0, 1.0, 0.0])
    assert drawn(logits, top_k=1, logit_bias={7: 5.0}) == {7}
    assert drawn(logits, top_k=1, min_tokens=9, suppressed_token_ids=[5]) == {6}
    assert drawn(logits, top_k=1, logit_bias={5: 9.0}, min_tokens=9, suppressed_token_ids=[5]) == {6}
    assert drawn(logits, min_p=0.2) == {5, 6}
    assert drawn(logits, min_p=0.2, temperature=2.0) == {5, 6, 7}
    assert drawn(logits, top_k=1, output=[5, 5], frequency_penalty=0.6) == {6}


# --- history


def test_end_tokens_are_masked_until_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 40] = 50.0
    settings: dict[str, Any] = {"min_tokens": 2, "suppressed_token_ids": [40]}
    for temperature in (0.0, 1.0):
        for num_output in range(4):
            chosen = drawn(logits, 20, output=[9] * num_output, temperature=temperature, **settings)
            assert (chosen == {40}) == (num_output >= 2)


def test_end_tokens_cost_nothing_after_min_tokens() -> None:
    """Every seq of a model with EOS has end tokens, so their masks must not copy the logits at each step."""
    settings: dict[str, Any] = {"min_tokens": 2, "suppressed_token_ids": [40]}
    assert rows_of([state(VOCAB_SIZE, output=[9], **settings)]).edits is not None
    assert rows_of([state(VOCAB_SIZE, output=[9, 9], **settings)]).edits is None


def test_min_tokens_counts_drafts_before_the_position() -> None:
    seq = state(VOCAB_SIZE, output=[9], min_tokens=2, suppressed_token_ids=[40], temperature=0.0)
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 40] = 1.0
    rows = SamplingRows.build([RowEntry(seq, 6, ()), RowEntry(seq, 7, [8])], CPU)
    assert Sampler(SoloGroup(), VOCAB_SIZE).sample(logits, 0, rows).token_ids.tolist() == [0, 40]


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4}


def choices_behind(seq: SeqSamplingState, hypothetical: list[int]) -> list[int]:
    logits = random_logits(64)
    logits[:, [3, 9, 77]] += 6.0  # so that the penalties on them decide
    rows = [RowEntry(seq, seq.length + len(hypothetical), hypothetical)] * 64
    return Sampler(SoloGroup(), VOCAB_SIZE).sample(logits, 0, SamplingRows.build(rows, CPU)).token_ids.tolist()


def test_drafts_before_a_position_count_like_committed_tokens() -> None:
    tokens = [9, 9, 77, 3, 9]
    for split in range(len(tokens) + 1):
        seq = state(VOCAB_SIZE, output=tokens[:split], **PENALTIES)
        assert choices_behind(seq, tokens[split:]) == choices_behind(state(VOCAB_SIZE, tokens, **PENALTIES), [])


def test_truncating_forgets() -> None:
    seq = state(VOCAB_SIZE, output=[9, 9, 77, 3], **PENALTIES)
    before = choices_behind(seq, [])
    seq.extend([9, 100, 101])
    seq.truncate(len(PROMPT) + 4)
    assert choices_behind(seq, []) == before
    seq.truncate(len(PROMPT))
    assert choices_behind(seq, []) == choices_behind(state(VOCAB_SIZE, **PENALTIES), [])


def test_penalties_equal_the_formula_over_a_long_history() -> None:
    generator = torch.Generator().manual_seed(1)
    prompt, output = (torch.randint(0, VOCAB_SIZE, (size,), generator=generator).tolist() for size in (40, 60))
    seq = SeqSamplingState(seq_sampling(temperature=0.0, logprobs=0, **PENALTIES), prompt, VOCAB_SIZE)
    seq.extend(output)
    logits = random_logits(1)
    expected = logits[0].clone()
    for token_id in range(VOCAB_SIZE):
        if token_id in prompt + output:
            expected[token_id] *= 1.3 if expected[token_id] < 0 else 1 / 1.3
        expected[token_id] -= 0.4 * output.count(token_id) + 0.7 * (token_id in output)
    rows = SamplingRows.build([RowEntry(seq, 100, ())], CPU)
    assert rows.edits is not None
    found = logits.clone()
    rows.edits.apply(found, 0)
    torch.testing.assert_close(found[0], expected)


def test_a_history_that_does_not_end_before_the_position_is_an_error() -> None:
    seq = state(VOCAB_SIZE, output=[9], presence_penalty=1.0)
    with pytest.raises(AssertionError, match="position 9"):
        SamplingRows.build([RowEntry(seq, 9, [1])], CPU)


def test_a_plain_seq_keeps_no_history() -> None:
    seq = state(VOCAB_SIZE, output=range(10), top_k=3, logprobs=2)
    assert seq.counts_behind([1, 2]) is None


# --- batches and shards


@pytest.mark.parametrize("logits_kind", LOGITS)
def test_a_row_does_not_see_its_batch(logits_kind: str) -> None:
    states = mixed_states(VOCAB_SIZE)
    logits = LOGITS[logits_kind](len(states), VOCAB_SIZE)
    together = as_tuple(sample_whole(logits, states))
    for row in range(len(states)):
        alone = as_tuple(sample_whole(logits[row : row + 1], states[row : row + 1]))
        assert alone[0][0] == together[0][row]
        assert alone[2] in ([], [together[2][row]])


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
def test_a_long_row_does_not_see_its_batch(num_rows: int) -> None:
    vocab_size = 5003
    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(2))
    settings = [{"top_p": 0.7}, {"top_p": 0.97}, {"logprobs": 2}, {"min_p": 0.1, "top_k": 3000}]
    states = [state(vocab_size, seed=row, **settings[row % 4]) for row in range(64)]
    whole = as_tuple(sample_whole(logits, states))
    part = as_tuple(sample_whole(logits[-num_rows:], states[-num_rows:]))
    assert part[0] == whole[0][-num_rows:]
    assert part[2] in ([], whole[2][-num_rows:])


@pytest.mark.parametrize("tp_size", [2, 4, 7])
@pytest.mark.parametrize("logits_kind", LOGITS)
def test_shards_choose_what_the_whole_vocabulary_chooses(logits_kind: str, tp_size: int) -> None:
    states = mixed_states(VOCAB_SIZE)
    logits = LOGITS[logits_kind](len(states), VOCAB_SIZE)
    expected = as_tuple(sample_whole(logits, states))
    rows = rows_of(states)
    for sampled in run_ranks(tp_size, lambda group: sample_sharded(group, logits, rows)):
        assert as_tuple(sampled) == expected


def test_shards_agree_if_candidates_do_not_suffice() -> None:
    """2 shards of 3000 tokens: the nucleus and top-k are far larger than what is exchanged at first."""
    vocab_size = 6000
    settings: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 2500}, {"top_k": 2900, "top_p": 0.99}, {"top_p": 0.05}]
    states = [state(vocab_size, seed=row, **settings[row % 4]) for row in range(16)]
    logits = torch.randn(16, vocab_size, generator=torch.Generator().manual_seed(3)) * 0.2
    logits[8:] = logits[8:].mul(5).round()
    expected = as_tuple(sample_whole(logits, states))
    rows = rows_of(states)
    assert [as_tuple(sampled) for sampled in run_ranks(2, lambda group: sample_sharded(group, logits, rows))] == [
        expected,
        expected,
    ]


def test_a_nucleus_of_one_shard_is_not_filled_up_from_the_other() -> None:
    """The candidates of both shards together reach the nucleus' mass, but all of the nucleus is in the first shard,
    beyond its candidates."""
    logits = torch.full((20, 6000), -1.0)
    logits[:, :1000] = 0.0
    rows = rows_of([state(6000, seed=seed, top_p=0.22) for seed in range(20)])
    for sampled in run_ranks(2, lambda group: sample_sharded(group, logits, rows)):
        assert max(sampled.token_ids.tolist()) < 1000


def test_a_shard_of_padding_only() -> None:
    states = mixed_states(3, copies=1)
    logits = torch.randn(len(states), 3, generator=torch.Generator().manual_seed(4))
    expected = as_tuple(sample_whole(logits, states))
    rows = rows_of(states)
    for sampled in run_ranks(4, lambda group: sample_sharded(group, logits, rows)):
        assert as_tuple(sampled) == expected


@pytest.mark.parametrize(("names", "num_collectives"), [(["plain", "greedy", "penalties"], 1), (["min_p"], 2)])
def test_plain_rows_cost_one_small_collective(names: list[str], num_collectives: int) -> None:
    states = [state(VOCAB_SIZE, **SETTINGS[name]) for name in names]
    logits, rows = random_logits(len(states)), rows_of(states)

    def count(group: Any) -> int:
        sample_sharded(group, logits, rows)
        return int(group.num_collectives)

    assert run_ranks(2, count) == [num_collectives] * 2


def test_logits_stay_unchanged() -> None:
    states = mixed_states(VOCAB_SIZE)
    logits = random_logits(len(states))
    before = logits.clone()
    sample_whole(logits, states)
    assert torch.equal(logits, before)


# --- runners-up and confidence


def best_by_removal(logits: torch.Tensor, item: SeqSamplingState, num: int) -> list[int]:
    """The tokens in order of choice: after the same truncation, each chosen token is masked for the next choice."""
    rows = rows_of([item])
    processed = logits.clone()
    if rows.edits is not None:
        rows.edits.apply(processed, 0)
    thresholds = None
    if rows.truncation is not None:
        thresholds = truncation_threshold(processed, rows.temperature, rows.truncation)
    chosen: list[int] = []
    for _ in range(num):
        values, token_ids = sample(processed, rows.temperature, rows.keys, thresholds=thresholds)
        if float(values) == -math.inf:
            break
        chosen.append(int(token_ids))
        processed[0, chosen[-1]] = -torch.inf
    return chosen + chosen[-1:] * (num - len(chosen))


@pytest.mark.parametrize("logits_kind", LOGITS)
def test_alternatives_are_what_would_have_been_chosen_next(logits_kind: str) -> None:
    states = mixed_states(VOCAB_SIZE, copies=1)
    logits = LOGITS[logits_kind](len(states), VOCAB_SIZE)
    sampler = Sampler(SoloGroup(), VOCAB_SIZE)
    sampled = sampler.sample(logits, 0, rows_of(states), num_alternatives=6)
    assert sampled.alternatives is not None
    for row, item in enumerate(states):
        expected = best_by_removal(logits[row : row + 1], item, 7)
        assert [int(sampled.token_ids[row]), *sampled.alternatives[row].tolist()] == expected


def test_the_last_alternative_is_repeated_if_fewer_remain() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0], [9.0, 5.0, 4.0, 3.0]])
    states = [state(4, temperature=0.0), state(4, top_k=1)]
    states[0] = state(4, temperature=0.0, min_tokens=9, suppressed_token_ids=[0, 3])
    sampled = Sampler(SoloGroup(), 4).sample(logits, 0, rows_of(states), num_alternatives=3)
    assert sampled.token_ids.tolist() == [1, 0]
    assert sampled.alternatives is not None
    assert sampled.alternatives.tolist() == [[2, 2, 2], [0, 0, 0]]


def test_confidence_is_the_softmax_at_the_temperature_of_the_request() -> None:
    states = mixed_states(VOCAB_SIZE, copies=1)
    logits = random_logits(len(states))
    rows = rows_of(states)
    sampled = Sampler(SoloGroup(), VOCAB_SIZE).sample(logits, 0, rows, with_confidence=True)
    processed = logits.clone()
    assert rows.edits is not None
    rows.edits.apply(processed, 0)
    temperature = torch.where(rows.temperature > 0, rows.temperature, 1.0).double().unsqueeze(1)
    expected = (processed.double() / temperature).softmax(dim=1).gather(1, sampled.token_ids.unsqueeze(1)).squeeze(1)
    assert sampled.confidences is not None
    assert sampled.confidences.dtype == torch.float32
    torch.testing.assert_close(sampled.confidences.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("tp_size", [2, 4, 7])
@pytest.mark.parametrize("logits_kind", LOGITS)
def test_shards_agree_on_alternatives_and_on_the_bits_of_confidences(logits_kind: str, tp_size: int) -> None:
    states = mixed_states(VOCAB_SIZE, copies=1)
    logits = LOGITS[logits_kind](len(states), VOCAB_SIZE)
    rows = rows_of(states)

    def run(group: Any) -> SampledRows:
        shard, start = shard_of(logits, group)
        return Sampler(group, VOCAB_SIZE).sample(shard, start, rows, num_alternatives=4, with_confidence=True)

    expected = run(SoloGroup())
    found = run_ranks(tp_size, run)
    for sampled in found:
        assert torch.equal(sampled.token_ids, expected.token_ids)
        assert torch.equal(sampled.alternatives, expected.alternatives)
        assert torch.equal(sampled.confidences, found[0].confidences)
        torch.testing.assert_close(sampled.confidences, expected.confidences, rtol=1e-5, atol=1e-9)


def test_alternatives_and_confidences_are_left_out_unless_asked_for() -> None:
    sampled = sample_whole(random_logits(2), [state(VOCAB_SIZE)] * 2)
    assert sampled.alternatives is None
    assert sampled.confidences is None


# --- bad logits


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_bad_row_is_reported_and_harms_no_other(bad: float, tp_size: int) -> None:
    states = mixed_states(VOCAB_SIZE, copies=1)
    logits = random_logits(len(states))
    expected, _, expected_logprobs = as_tuple(sample_whole(logits, states))
    rows = rows_of(states)
    for bad_row in range(len(states)):
        damaged = logits.clone()
        damaged[bad_row, 100] = bad
        for sampled in run_ranks(tp_size, lambda group, damaged=damaged: sample_sharded(group, damaged, rows)):
            assert sampled.non_finite.nonzero().flatten().tolist() == [bad_row]
            token_ids, _, logprobs = as_tuple(sampled)
            assert [token_ids[row] for row in range(len(states)) if row != bad_row] == [
                expected[row] for row in range(len(states)) if row != bad_row
            ]
            assert all(logprobs[row] == expected_logprobs[row] for row in range(len(states)) if row != bad_row)


# --- logprobs


def test_logprobs_are_log_softmax_of_raw_logits() -> None:
    logits = random_logits(8)
    states = [
        state(VOCAB_SIZE, seed=row, logprobs=row, temperature=0.3, top_k=5, logit_bias={50: 30.0}) for row in range(8)
    ]
    sampled = sample_whole(logits, states)
    expected = logits.double().log_softmax(dim=1)
    assert sampled.logprobs is not None
    assert set(sampled.token_ids.tolist()) == {50}
    for row, found in enumerate(sampled.logprobs):
        assert found is not None
        assert found.chosen.token_id == 50
        assert found.chosen.logprob == pytest.approx(float(expected[row, 50]), abs=2e-6)
        assert found.chosen.rank == int((logits[row] > logits[row, 50]).sum()) + 1
        best = expected[row].topk(row)
        assert [entry.token_id for entry in found.top] == best.indices.tolist()
        assert [entry.rank for entry in found.top] == list(range(1, row + 1))
        assert [entry.logprob for entry in found.top] == pytest.approx(best.values.tolist(), abs=2e-6)


def test_tied_logprobs_list_the_lowest_ids_and_share_a_rank() -> None:
    sampled = sample_whole(torch.zeros(1, 40), [state(40, logprobs=3)])
    assert sampled.logprobs is not None
    found = sampled.logprobs[0]
    assert found is not None
    assert [(entry.token_id, entry.rank) for entry in found.top] == [(0, 1), (1, 1), (2, 1)]
    assert found.chosen.rank == 1
    assert found.chosen.logprob == pytest.approx(-math.log(40), abs=1e-6)


def test_rows_that_did_not_ask_get_none() -> None:
    sampled = sample_whole(random_logits(3), [state(VOCAB_SIZE), state(VOCAB_SIZE, logprobs=0), state(VOCAB_SIZE)])
    assert sampled.logprobs is not None
    assert [entry is None for entry in sampled.logprobs] == [True, False, True]
    assert sample_whole(random_logits(1), [state(VOCAB_SIZE)]).logprobs is None


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_prompt_logprobs(tp_size: int) -> None:
    logits = random_logits(20)
    logits[7, 3] = math.nan
    next_token_ids = torch.arange(20) * 6
    expected = logits.double().log_softmax(dim=1)

    def run(group: Any) -> list[Any]:
        shard, start = shard_of(logits, group)
        return Sampler(group, VOCAB_SIZE).prompt_logprobs(shard, start, next_token_ids, 2)

    for found in run_ranks(tp_size, run):
        assert len(found) == 20
        for row, entry in enumerate(found):
            assert entry.chosen.token_id == row * 6
            if row == 7:
                assert math.isnan(entry.chosen.logprob)
                continue
            assert entry.chosen.logprob == pytest.approx(float(expected[row, row * 6]), abs=2e-6)
            assert [top.token_id for top in entry.top] == expected[row].topk(2).indices.tolist()


def test_vocabulary_too_large_to_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Sampler(SoloGroup(), 1 << 20)


def test_sampler_and_kernel_agree_on_plain_rows() -> None:
    logits = random_logits(5)
    rows = rows_of([state(VOCAB_SIZE, seed=seed) for seed in range(5)])
    expected = sample(logits, rows.temperature, rows.keys)[1]
    assert torch.equal(Sampler(SoloGroup(), VOCAB_SIZE).sample(logits, 0, rows).token_ids, expected)
