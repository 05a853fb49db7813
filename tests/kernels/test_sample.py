"""One token per row: the pruned path equals the plain one bit for bit, and nothing around a row changes its choice."""

import pytest
import torch
from torch import Tensor

from kernels.sampling import sample_cpu
from kernels.sampling.gumbel import gumbel_noise_range
from kernels.sampling.noise_keys import NoiseKeys, scale_by_temperature
from kernels.sampling.sample import sample, sample_reference
from kernels.sampling.sample_cpu import TILE, TILES_AT_ONCE
from kernels.sampling.sample_top import sample_top, sample_top_reference
from kernels.sampling.sort_key import pack_sort_key, unpack_sort_key
from kernels.sampling.top_keys import top_sort_keys, top_sort_keys_reference

pytestmark = pytest.mark.usefixtures("implementation")


def noise_keys(num_rows: int, seed: int = 0) -> NoiseKeys:
    generator = torch.Generator().manual_seed(seed)
    return NoiseKeys(
        seeds=torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=generator),
        sample_indices=torch.randint(0, 3, (num_rows,), generator=generator),
        positions=torch.randint(0, 1 << 17, (num_rows,), generator=generator),
    )


def logits_of_kind(kind: str, num_rows: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_rows, num_tokens, generator=generator)
    match kind:
        case "peaked":  # a few tokens within reach of the best
            return torch.where(torch.rand(logits.shape, generator=generator) < 5 / num_tokens, 40 + logits, logits)
        case "flat":
            return torch.zeros_like(logits)
        case "tied":  # few values, many tokens each
            return (logits * 2).round() * 8
        case "swallowing":  # units in the last place of 32: with noise, tokens 32 below the largest can tie with it
            return 4e8 - 32 * (logits.abs() * 2).round()
        case "truncated":
            return logits.masked_fill(logits < 1.5, -torch.inf)
        case "mixed":  # sparse and dense rows in one batch
            return logits * torch.tensor([0.1, 40.0]).repeat(num_rows)[:num_rows].unsqueeze(1)
        case _:
            return logits * 3


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "swallowing", "truncated", "mixed", "plain"])
@pytest.mark.parametrize(("num_rows", "num_tokens", "first_token_id"), [(5, 1, 3), (7, 131, 0), (6, 4099, 2049)])
def test_pruning_only_saves_work(kind: str, num_rows: int, num_tokens: int, first_token_id: int) -> None:
    logits, keys = logits_of_kind(kind, num_rows, num_tokens), noise_keys(num_rows)
    temperature = torch.tensor([1.0, 0.0, 0.7]).repeat(num_rows)[:num_rows]
    values, token_ids = sample(logits, temperature, keys, first_token_id=first_token_id)
    expected_values, expected_ids = sample_reference(logits, temperature, keys, first_token_id=first_token_id)
    assert torch.equal(values, expected_values)
    assert torch.equal(token_ids, expected_ids)


@pytest.mark.parametrize("kind", ["flat", "tied", "truncated", "plain"])
@pytest.mark.parametrize(("num_tokens", "first_token_id"), [(1, 3), (131, 1), (4096, 0), (4099, 2049)])
def test_batches_that_are_greedy_throughout(kind: str, num_tokens: int, first_token_id: int) -> None:
    logits, keys, temperature = logits_of_kind(kind, 5, num_tokens), noise_keys(5), torch.zeros(5)
    logits[2] = -torch.inf
    values, token_ids = sample(logits, temperature, keys, first_token_id=first_token_id)
    expected = sample_reference(logits, temperature, keys, first_token_id=first_token_id)
    assert torch.equal(values, expected[0])
    assert torch.equal(token_ids, expected[1])


def test_vocabularies_longer_than_one_draw() -> None:
    num_tokens = 2 * TILE * TILES_AT_ONCE + 77
    logits, keys, temperature = torch.zeros(2, num_tokens), noise_keys(2), torch.tensor([1.0, 0.0])
    values, token_ids = sample(logits, temperature, keys, first_token_id=5)
    expected_values, expected_ids = sample_reference(logits, temperature, keys, first_token_id=5)
    assert torch.equal(values, expected_values)
    assert torch.equal(token_ids, expected_ids)
    assert int(token_ids[1]) == 5


def test_choice_is_the_argmax_of_logit_plus_noise() -> None:
    logits, keys = logits_of_kind("plain", 4, 100), noise_keys(4)
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.0])
    noise = gumbel_noise_range(keys.seeds, keys.sample_indices, keys.positions, first_token_id=0, num_tokens=100)
    _, token_ids = sample(logits, temperature, keys)
    assert torch.equal(token_ids, (logits / temperature.unsqueeze(1) + noise).argmax(dim=1))


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.full((3, 5000), -1.0)
    logits[0, [4999, 70, 71]] = 2.0
    logits[1] = 0.0
    logits[2, [0, 4999]] = -0.5
    _, token_ids = sample(logits, torch.zeros(3), noise_keys(3))
    assert token_ids.tolist() == [70, 0, 0]


def test_temperature_zero_leaves_logits_alone() -> None:
    logits = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    assert torch.equal(scale_by_temperature(logits, torch.tensor([0.0, 0.5])), torch.tensor([[1.0, 3.0], [2.0, 6.0]]))


@pytest.mark.parametrize("kind", ["flat", "tied", "plain", "truncated"])
@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_the_best_of_the_shards_is_the_best_of_all(kind: str, tp_size: int) -> None:
    logits, keys = logits_of_kind(kind, 6, 1003), noise_keys(6)
    temperature = torch.tensor([1.0, 0.0]).repeat(3)
    shard_keys, start = [], 0
    for shard in logits.tensor_split(tp_size, dim=1):
        shard_keys.append(pack_sort_key(*sample(shard, temperature, keys, first_token_id=start)))
        start += shard.shape[1]
    _, token_ids = unpack_sort_key(torch.stack(shard_keys).amax(dim=0))
    assert torch.equal(token_ids, sample(logits, temperature, keys)[1])


def test_a_shard_without_tokens_never_wins() -> None:
    values, token_ids = sample(torch.full((2, 40), -torch.inf), torch.tensor([0.0, 1.0]), noise_keys(2))
    assert values.tolist() == [-torch.inf, -torch.inf]
    assert token_ids.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["mixed", "plain", "peaked"])
def test_a_row_does_not_see_its_batch(kind: str) -> None:
    logits, keys = logits_of_kind(kind, 64, 1031), noise_keys(64)
    temperature = torch.tensor([1.0, 1.0, 0.0, 0.3]).repeat(16)
    values, token_ids = sample(logits, temperature, keys)
    for size in (1, 2, 3, 7, 33):
        rows = torch.arange(64 - size, 64)
        alone = sample(logits[rows], temperature[rows], keys.select(rows))
        assert torch.equal(alone[0], values[rows])
        assert torch.equal(alone[1], token_ids[rows])


def test_asking_for_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="num must be"):
        sample_top(torch.zeros(1, 4), torch.ones(1), noise_keys(1), num=0)


def test_strided_logits() -> None:
    logits, keys, temperature = logits_of_kind("plain", 8, 500), noise_keys(4), torch.ones(4)
    rows = logits[::2, 100:300]
    assert torch.equal(sample(rows, temperature, keys)[1], sample(rows.contiguous(), temperature, keys)[1])
    with pytest.raises(ValueError, match="contiguous"):
        sample(logits[:4, ::2], temperature, keys)


def test_strided_or_missing_numbers_of_rows_are_refused() -> None:
    """A kernel would read what lies between them."""
    logits, keys = torch.zeros(2, 8), noise_keys(2)
    with pytest.raises(ValueError, match="temperature must be contiguous"):
        sample(logits, torch.ones(4)[::2], keys)
    with pytest.raises(ValueError, match=r"thresholds must be contiguous torch.float32 \[2\]"):
        sample_top(logits, torch.ones(2), keys, num=2, thresholds=torch.zeros(1))
    with pytest.raises(ValueError, match="seeds must be contiguous"):
        sample(logits, torch.ones(2), noise_keys(3))


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        sample(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(1), noise_keys(1))


def test_sort_keys_order_by_value_then_lowest_id() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.cat((torch.randn(500, generator=generator).mul(3).round(), torch.tensor([-torch.inf, -0.0, 0.0])))
    token_ids = torch.randperm(503, generator=generator) * 8_000_000
    keys = pack_sort_key(values, token_ids)
    best_first = sorted(range(503), key=lambda index: (-float(values[index]), int(token_ids[index])))
    assert keys.argsort(descending=True).tolist() == best_first
    unpacked = unpack_sort_key(keys)
    assert torch.equal(unpacked[0], values)
    assert torch.equal(unpacked[1], token_ids)


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "swallowing", "truncated", "mixed", "plain"])
@pytest.mark.parametrize(("num_rows", "num_tokens", "first_token_id"), [(5, 1, 3), (7, 131, 0), (6, 4099, 2049)])
@pytest.mark.parametrize("num", [1, 3, 80])
def test_the_best_few_equal_those_of_a_sort(
    kind: str, num_rows: int, num_tokens: int, first_token_id: int, num: int
) -> None:
    logits, keys = logits_of_kind(kind, num_rows, num_tokens), noise_keys(num_rows)
    temperature = torch.tensor([1.0, 0.0, 0.7]).repeat(num_rows)[:num_rows]
    options = {"num": num, "first_token_id": first_token_id}
    values, token_ids = sample_top(logits, temperature, keys, **options)
    expected_values, expected_ids = sample_top_reference(logits, temperature, keys, **options)
    assert torch.equal(values, expected_values)
    assert torch.equal(token_ids, expected_ids)
    best_values, best_ids = sample(logits, temperature, keys, first_token_id=first_token_id)
    assert torch.equal(values[:, 0], best_values)
    assert torch.equal(token_ids[:, 0], best_ids)
    found = top_sort_keys(logits, num, first_token_id=first_token_id)
    assert torch.equal(found, top_sort_keys_reference(logits, num, first_token_id=first_token_id))


@pytest.mark.parametrize("kind", ["flat", "tied", "plain", "mixed"])
def test_logits_below_the_threshold_count_as_masked(kind: str) -> None:
    logits, keys = logits_of_kind(kind, 6, 3001), noise_keys(6)
    temperature = torch.tensor([1.0, 0.0, 0.7]).repeat(2)
    scaled = scale_by_temperature(logits, temperature)
    thresholds = torch.cat((torch.tensor([-torch.inf]), scaled.sort(dim=1).values[1:, 2990]))
    masked = logits.masked_fill(scaled < thresholds.unsqueeze(1), -torch.inf)
    found = sample(logits, temperature, keys, thresholds=thresholds)
    assert [torch.equal(a, b) for a, b in zip(found, sample_reference(masked, temperature, keys), strict=True)] == [
        True,
        True,
    ]
    found = sample_top(logits, temperature, keys, num=20, thresholds=thresholds)
    expected = sample_top_reference(masked, temperature, keys, num=20)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_an_unlucky_row_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the goal that nearly always works is far too high, no token reaches it: then the goal that is certain
    counts."""
    monkeypatch.setattr(sample_cpu, "LIKELY_TOKENS", 1e-17)
    logits, keys, temperature = logits_of_kind("plain", 6, 3001), noise_keys(6), torch.ones(6)
    found, expected = sample(logits, temperature, keys), sample_reference(logits, temperature, keys)
    assert torch.equal(found[1], expected[1])


def test_top_sort_keys_take_the_lowest_ids_of_a_tie() -> None:
    _, token_ids = unpack_sort_key(top_sort_keys(torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0]]), 4, first_token_id=10))
    assert token_ids.tolist() == [[11, 14, 10, 12]]
