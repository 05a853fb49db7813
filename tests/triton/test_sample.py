"""The kernels that choose tokens give the token and the value of the reference, bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels.sampling.noise_keys import NoiseKeys, scale_by_temperature
from kernels.sampling.sample import sample, sample_reference
from kernels.sampling.sample_top import sample_top, sample_top_reference
from kernels.sampling.sort_key import EXCLUDED_KEY, pack_sort_key, unpack_sort_key
from kernels.sampling.top_keys import top_sort_keys, top_sort_keys_reference, top_values

KINDS = ["plain", "peaked", "two peaks", "flat", "tied", "swallowing", "truncated", "excluded"]


def noise_keys(num_rows: int, seed: int = 0) -> NoiseKeys:
    generator = torch.Generator().manual_seed(seed)
    return NoiseKeys(
        seeds=torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=generator),
        sample_indices=torch.randint(0, 3, (num_rows,), generator=generator),
        positions=torch.randint(0, 1 << 17, (num_rows,), generator=generator),
    )


def keys_on(device: torch.device, keys: NoiseKeys) -> NoiseKeys:
    return NoiseKeys(
        seeds=keys.seeds.to(device),
        sample_indices=keys.sample_indices.to(device),
        positions=keys.positions.to(device),
    )


def logits_of_kind(kind: str, num_rows: int, num_tokens: int) -> Tensor:
    logits = torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(1))
    match kind:
        case "peaked":
            logits[:, num_tokens // 2] = 60.0
        case "two peaks":  # in one tile, where the bounds of the noise leave both
            logits[:, [num_tokens // 2, num_tokens // 2 + 1]] = 60.0
        case "flat":
            logits.zero_()
        case "tied":  # few values, many tokens each; both zeros
            logits = (logits * 2).round() * 8
        case "swallowing":  # units in the last place of 32: with noise, tokens 32 below the largest can tie with it
            logits = 4e8 - 32 * (logits.abs() * 2).round()
        case "truncated":
            logits.masked_fill_(logits < 2.0, -torch.inf)
        case "excluded":
            logits.fill_(-torch.inf)
    return logits


def temperatures(num_rows: int) -> Tensor:
    return torch.tensor([0.7, 0.0, 1.0]).repeat(num_rows)[:num_rows]


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_the_reference(kind: str, device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind(kind, 3, 1031), temperatures(3), noise_keys(3)
    found = sample(logits.to(device), temperature.to(device), keys_on(device, keys), first_token_id=18)
    assert_equal(found, sample_reference(logits, temperature, keys, first_token_id=18))


@pytest.mark.parametrize(("num_tokens", "first_token_id"), [(1, 3), (5, 1), (1021, 3), (1024, 0)])
def test_sizes_and_starts(num_tokens: int, first_token_id: int, device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind("flat", 2, num_tokens), torch.ones(2), noise_keys(2)
    found = sample(logits.to(device), temperature.to(device), keys_on(device, keys), first_token_id=first_token_id)
    assert_equal(found, sample_reference(logits, temperature, keys, first_token_id=first_token_id))


def test_a_long_strided_row(device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind("plain", 4, 20_011)[::2, 7:], torch.ones(2), noise_keys(2)
    found = sample(logits.to(device), temperature.to(device), keys_on(device, keys))
    assert_equal(found, sample_reference(logits, temperature, keys))


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_thresholds_exclude(kind: str, device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind(kind, 3, 300), temperatures(3), noise_keys(3)
    thresholds = scale_by_temperature(logits, temperature).sort(dim=1).values[:, 296].contiguous()
    thresholds[2] = -torch.inf
    on_device = (logits.to(device), temperature.to(device), keys_on(device, keys))
    found = sample(*on_device, thresholds=thresholds.to(device))
    assert_equal(found, sample_reference(logits, temperature, keys, thresholds=thresholds))
    found = sample_top(*on_device, num=6, thresholds=thresholds.to(device))
    assert_equal(found, sample_top_reference(logits, temperature, keys, num=6, thresholds=thresholds))


@pytest.mark.parametrize("kind", ["flat", "tied", "truncated"])
def test_the_best_of_the_shards_is_the_best_of_all(kind: str, device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind(kind, 2, 1003), torch.tensor([1.0, 0.0]), noise_keys(2)
    shard_keys, start = [], 0
    for shard in logits.to(device).tensor_split(3, dim=1):
        chosen = sample(shard, temperature.to(device), keys_on(device, keys), first_token_id=start)
        shard_keys.append(pack_sort_key(*chosen))
        start += shard.shape[1]
    _, token_ids = unpack_sort_key(torch.stack(shard_keys).amax(dim=0))
    assert torch.equal(token_ids.cpu(), sample_reference(logits, temperature, keys)[1])


@pytest.mark.parametrize("kind", ["plain", "tied", "excluded"])
def test_sample_top_is_the_reference(kind: str, device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind(kind, 3, 1031), temperatures(3), noise_keys(3)
    options = {"num": 4, "first_token_id": 18}
    found = sample_top(logits.to(device), temperature.to(device), keys_on(device, keys), **options)
    assert_equal(found, sample_top_reference(logits, temperature, keys, **options))


@pytest.mark.parametrize("kind", ["tied", "truncated"])
def test_top_sort_keys_is_the_reference(kind: str, device: torch.device) -> None:
    logits = logits_of_kind(kind, 2, 1030)
    found = top_sort_keys(logits.to(device), 7, first_token_id=5)
    assert torch.equal(found.cpu(), top_sort_keys_reference(logits, 7, first_token_id=5))
    assert torch.equal(top_values(logits.to(device), 7).cpu(), logits.topk(7, dim=1).values)


def test_ties_go_to_the_lowest_id_and_both_zeros_are_equal(device: torch.device) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0]], device=device)
    _, token_ids = unpack_sort_key(top_sort_keys(logits, 8, first_token_id=10))
    assert token_ids[0, :5].tolist() == [11, 12, 13, 10, 14]
    assert (top_sort_keys(logits, 8)[0, 5:] == EXCLUDED_KEY).all()
    assert int(sample(logits, torch.zeros(1, device=device), keys_on(device, noise_keys(1)))[1]) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_harms_no_other(bad: float, device: torch.device) -> None:
    logits, temperature, keys = logits_of_kind("plain", 3, 140), torch.ones(3), noise_keys(3)
    expected = sample_top_reference(logits, temperature, keys, num=2)
    logits[1, 60:] = bad
    found = sample_top(logits.to(device), temperature.to(device), keys_on(device, keys), num=2)
    assert torch.equal(found[1][[0, 2]].cpu(), expected[1][[0, 2]])
    token_ids = sample(logits.to(device), temperature.to(device), keys_on(device, keys))[1].cpu()
    assert torch.equal(token_ids[[0, 2]], expected[1][[0, 2], 0])
    assert 0 <= int(token_ids[1]) < 140  # still a token id: callers index the row with it


def test_no_rows(device: torch.device) -> None:
    nothing, keys = torch.empty((0, 9), device=device), keys_on(device, noise_keys(0))
    assert sample(nothing, nothing[:, 0], keys)[1].shape == (0,)
    assert sample_top(nothing, nothing[:, 0], keys, num=3)[1].shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_vocabularies(kind: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too much for the interpreter")
    logits, temperature, keys = logits_of_kind(kind, 64, 128_256), temperatures(64), noise_keys(64)
    on_device = (logits.to(device), temperature.to(device), keys_on(device, keys))
    expected = sample_top_reference(logits, temperature, keys, num=4)
    assert_equal(sample(*on_device), (expected[0][:, 0], expected[1][:, 0]))
    assert_equal(sample_top(*on_device, num=4), expected)
