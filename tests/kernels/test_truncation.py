"""Min-p, top-k and top-p compared with a plain fp64 version, and the test that candidates suffice."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.native.linear import why_not
from kernels.native.sampling import native_choose
from kernels.sampling.noise_keys import NoiseKeys, row_settings
from kernels.sampling.probability_mass import MASS_BITS, probability_mass, total_mass
from kernels.sampling.sample_top import sample_top_reference
from kernels.sampling.truncation import Candidates, Truncation, min_p_top_k_threshold, top_p_threshold


def truncation(min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0, num_rows: int = 1) -> Truncation:
    return Truncation(
        log_min_p=torch.full((num_rows,), math.log(min_p) if min_p else -math.inf),
        top_k=torch.full((num_rows,), top_k),
        top_p=torch.full((num_rows,), top_p, dtype=torch.float64),
        max_top_k=top_k,
        has_top_p=top_p < 1,
    )


def thresholds(logits: Tensor, settings: Truncation, num_candidates: int | None = None) -> tuple[Tensor, Tensor]:
    """Thresholds from the largest logits only; `covered` says whether these were enough."""
    num_tokens = logits.shape[1]
    values = logits.topk(num_candidates or num_tokens, dim=1).values
    rest = values[:, -1] if values.shape[1] < num_tokens else torch.full_like(values[:, -1], -torch.inf)
    candidates = Candidates(values=values, rest=rest)
    threshold, covered = min_p_top_k_threshold(candidates, settings)
    mass = total_mass(logits, values[:, 0].contiguous(), threshold)
    threshold, top_p_covered = top_p_threshold(candidates, settings, threshold, mass)
    return threshold, covered & top_p_covered


def kept(logits: Tensor, settings: Truncation) -> list[list[int]]:
    threshold, covered = thresholds(logits, settings)
    assert bool(covered.all())
    return [row.nonzero().squeeze(1).tolist() for row in logits >= threshold.unsqueeze(1)]


def kept_by_definition(logits: list[float], min_p: float, top_k: int, top_p: float) -> list[int]:
    """The tokens kept in one row, in fp64; a token equal to a kept one is kept."""
    probability = np.exp(np.array(logits) - max(logits))
    left = probability >= min_p * probability.max()
    if top_k:
        left &= probability >= np.sort(np.where(left, probability, 0))[::-1][min(top_k, len(logits)) - 1]
    descending = np.sort(np.where(left, probability, 0))[::-1]
    reached = descending.cumsum() / descending.sum()
    last = int(np.searchsorted(reached, top_p)) if top_p < 1 else len(logits) - 1
    return [int(index) for index in np.flatnonzero(left & (probability >= descending[last]))]


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (truncation(), [0, 1, 2, 3]),
        (truncation(top_k=1), [1]),
        (truncation(top_k=3), [1, 2, 3]),
        (truncation(top_k=9), [0, 1, 2, 3]),
        (truncation(top_p=0.01), [1]),
        (truncation(top_p=0.39), [1]),
        (truncation(top_p=0.41), [1, 3]),
        (truncation(top_p=0.71), [1, 2, 3]),
        (truncation(min_p=0.7), [1, 3]),
        (truncation(min_p=1.0), [1]),
        (truncation(top_k=2, top_p=0.6), [1, 3]),  # 0.4 / 0.7 < 0.6: top-p counts within what top-k left
        (truncation(top_k=2, top_p=0.57), [1]),
        (truncation(min_p=0.4, top_k=3, top_p=0.7), [1, 3]),
    ],
)
def test_small_cases(settings: Truncation, expected: list[int]) -> None:
    assert kept(PROBABILITIES, settings) == [expected]


def test_ties_at_a_threshold_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(logits, truncation(top_k=2)) == [[1, 2, 3, 4]]
    assert kept(logits, truncation(top_p=0.6)) == [[1, 2, 3, 4]]
    assert kept(torch.zeros(1, 50), truncation(top_k=3, top_p=0.1)) == [list(range(50))]


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_on_random_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        logits = torch.randn(1, 60, generator=generator) * 3
        if seed % 2:
            logits = logits.round()  # ties
        min_p, top_p = torch.rand(2, generator=generator).tolist()
        top_k = int(torch.randint(0, 70, (1,), generator=generator))
        found = kept(logits, truncation(min_p**4, top_k, top_p))
        assert found == [kept_by_definition(logits[0].tolist(), min_p**4, top_k, top_p)]


@pytest.mark.parametrize("settings", [{"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {"min_p": 0.2}])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_candidates_that_claim_to_suffice_do_suffice(settings: dict[str, float], spread: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(40, 200, generator=generator) * spread * 2).round() / 2
    cut = truncation(**settings, num_rows=40)  # type: ignore[arg-type]
    expected, _ = thresholds(logits, cut)
    for num_candidates in (1, 5, 19, 20, 21, 100, 199):
        found, covered = thresholds(logits, cut, num_candidates)
        assert torch.equal(found[covered], expected[covered])
        if settings.get("top_k", 999) <= num_candidates and "top_p" not in settings:
            assert bool(covered.all())


def test_mass_is_exp_and_its_sum_is_exact() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = -(torch.rand(3, 5000, generator=generator) * 29)
    logits[:, 17] = 0.0
    mass = probability_mass(logits, torch.zeros(3))
    exact = logits.double().exp() * 2.0**MASS_BITS
    assert bool(((mass.double() - exact).abs() <= 2e-7 * exact + 1).all())
    shuffled = torch.randperm(5000, generator=generator)
    assert torch.equal(mass.sum(dim=1), mass[:, shuffled].sum(dim=1))
    assert torch.equal(mass[:, 3:4000], probability_mass(logits[:, 3:4000].clone(), torch.zeros(3)))


def test_mass_of_the_far_and_the_excluded_is_zero() -> None:
    logits = torch.tensor([[5.0, -26.0, -1e30, -torch.inf]])
    assert probability_mass(logits, torch.tensor([5.0])).tolist() == [[1 << MASS_BITS, 0, 0, 0]]


@pytest.mark.skipif(why_not() is not None, reason=f"cannot be compiled here: {why_not()}")
@pytest.mark.parametrize("num_tokens", [1, 60, 700, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 20.0])
def test_native_kernels_choose_among_the_same_tokens(num_tokens: int, spread: float) -> None:
    """The values of the best tokens show whether one was excluded: each is kept or dropped somewhere."""
    generator = torch.Generator().manual_seed(7)
    for number in range(24):
        logits = torch.randn(3, num_tokens, generator=generator) * spread
        if number % 2:
            logits = logits.round()  # ties
        temperature = torch.rand(3, generator=generator) + 0.1
        min_p, top_p = torch.rand(2, generator=generator).tolist()
        top_k = int(torch.randint(0, min(num_tokens, 300) + 2, (1,), generator=generator))
        cut = truncation(
            min_p**4 * (number % 3 == 0),
            top_k * (number % 4 < 2),
            (1.0, 0.99999)[number % 2] if number % 5 == 0 else top_p,
            3,
        )
        keys = NoiseKeys(
            seeds=torch.arange(3) + number, sample_indices=torch.zeros(3).long(), positions=torch.arange(3)
        )
        scaled = logits / temperature.unsqueeze(1)
        limits, covered = thresholds(scaled, cut)
        assert bool(covered.all())
        settings = row_settings(temperature, keys, None)
        settings["top_k"], settings["top_p"], settings["log_min_p"] = cut.top_k, cut.top_p, cut.log_min_p
        num = min(num_tokens, 65)
        values, token_ids = native_choose(logits, settings, num=num, first_token_id=0)
        expected = sample_top_reference(logits, temperature, keys, num=num, thresholds=limits)
        assert torch.equal(values, expected[0])
        assert torch.equal(token_ids, expected[1])
