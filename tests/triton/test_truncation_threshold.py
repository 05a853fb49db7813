"""The threshold of min-p, top-k and top-p, found by bisection, is the one that a sort finds."""

import math

import pytest
import torch
from torch import Tensor

from kernels.sampling.noise_keys import scale_by_temperature
from kernels.sampling.probability_mass import probability_mass
from kernels.sampling.truncation import Truncation
from kernels.sampling.truncation_threshold import truncation_threshold, truncation_threshold_reference

SETTINGS = [  # min_p, top_k, top_p
    (0.0, 5, 1.0),
    (0.01, 40, 0.8),
    (0.1, 0, 1.0),
    (0.2, 0, 0.3),
    (0.0, 0, 1 - 6e-8),
    (0.0, 700, 0.95),
]


def truncation(settings: list[tuple[float, int, float]], device: torch.device) -> Truncation:
    min_p, top_k, top_p = zip(*settings, strict=True)
    return Truncation(
        log_min_p=torch.tensor([math.log(x) if x else -math.inf for x in min_p], device=device),
        top_k=torch.tensor(top_k, device=device),
        top_p=torch.tensor(top_p, dtype=torch.float64, device=device),
        max_top_k=max(top_k),
        has_top_p=min(top_p) < 1,
    )


def logits_of_kind(kind: str, num_rows: int, num_tokens: int) -> Tensor:
    logits = torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(3)) * 3
    match kind:
        case "flat":
            return torch.zeros_like(logits)
        case "tied":
            return logits.round()
        case "masked":
            return logits.masked_fill(logits < 5, -torch.inf)
        case _:
            return logits


def assert_is_the_reference(
    logits: Tensor, temperature: Tensor, settings: list[tuple[float, int, float]], device: torch.device
) -> None:
    found = truncation_threshold(logits.to(device), temperature.to(device), truncation(settings, device))
    expected = truncation_threshold_reference(
        scale_by_temperature(logits, temperature), truncation(settings, torch.device("cpu"))
    )
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", ["random", "flat", "tied", "masked"])
def test_the_result_is_the_reference(kind: str, device: torch.device) -> None:
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.0])
    assert_is_the_reference(logits_of_kind(kind, 6, 600), temperature, SETTINGS, device)


@pytest.mark.parametrize("num_tokens", [1, 4097])
def test_sizes(num_tokens: int, device: torch.device) -> None:
    settings = [(0.0, 30, 0.9), (0.0, 0, 0.9)]
    assert_is_the_reference(logits_of_kind("random", 2, num_tokens), torch.ones(2), settings, device)


def test_a_mass_that_is_one_unit_short_is_not_enough(device: torch.device) -> None:
    logits = torch.tensor([[0.0, -1.0, -9.0]])
    mass = probability_mass(logits, torch.zeros(1))[0]
    top_p = (float(mass[0]) + 0.5) / float(mass.sum())
    assert_is_the_reference(logits, torch.ones(1), [(0.0, 0, top_p)], device)
    found = truncation_threshold(logits.to(device), torch.ones(1, device=device), truncation([(0.0, 0, top_p)], device))
    assert float(found) == -1.0


def test_a_bad_row_harms_no_other(device: torch.device) -> None:
    logits = logits_of_kind("random", 3, 200)
    settings = [(0.0, 5, 0.9)] * 3
    expected = truncation_threshold_reference(logits, truncation(settings, torch.device("cpu")))
    logits[1] = torch.nan
    found = truncation_threshold(logits.to(device), torch.ones(3, device=device), truncation(settings, device))
    assert torch.equal(found.cpu()[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", ["random", "flat", "tied", "masked"])
def test_whole_vocabularies(kind: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("too much for the interpreter")
    settings = [*SETTINGS, (0.0, 50, 0.95), (0.0, 0, 0.95)] * 8
    temperature = torch.tensor([1.0, 0.5]).repeat(32)
    assert_is_the_reference(logits_of_kind(kind, 64, 128_256), temperature, settings, device)
