"""Penalties, bias and masks, compared with formulas on single numbers."""

import torch

from kernels.sampling.penalties import apply_bias, apply_mask, apply_penalties

LOGITS = torch.tensor([[2.0, -2.0, 0.5, 1.0], [2.0, -2.0, 0.5, 1.0]])
NEUTRAL = (1.0, 0.0, 0.0)


def penalised(
    settings: list[tuple[float, float, float]], entries: list[tuple[int, int, bool, int]]
) -> list[list[float]]:
    logits = LOGITS.clone()
    rows, columns, seen, counts = zip(*entries, strict=True)
    apply_penalties(
        logits,
        torch.tensor(rows),
        torch.tensor(columns),
        seen=torch.tensor(seen),
        output_counts=torch.tensor(counts, dtype=torch.float32),
        settings=torch.tensor(settings),
    )
    return logits.tolist()


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    found = penalised([(2.0, 0.0, 0.0), NEUTRAL], [(0, 0, True, 0), (0, 1, True, 3), (0, 2, False, 0)])
    assert found == [[1.0, -4.0, 0.5, 1.0], LOGITS[1].tolist()]


def test_presence_and_frequency_count_the_output_only() -> None:
    found = penalised([NEUTRAL, (1.0, 0.5, 0.25)], [(1, 0, True, 0), (1, 1, True, 3), (1, 3, True, 1)])
    assert found == [LOGITS[0].tolist(), [2.0, -2.0 - 0.75 - 0.5, 0.5, 1.0 - 0.25 - 0.5]]


def test_repetition_comes_first() -> None:
    assert penalised([(2.0, 1.0, 0.0), NEUTRAL], [(0, 3, True, 2)])[0][3] == 1.0 / 2 - 1.0


def test_negative_penalties_encourage() -> None:
    assert penalised([(0.5, -1.0, -0.5), NEUTRAL], [(0, 3, True, 2)])[0][3] == 1.0 / 0.5 + 1.0 + 1.0


def test_extreme_settings_stay_finite() -> None:
    found = penalised([(1e-40, 0.0, 0.0), NEUTRAL], [(0, 0, True, 1), (0, 1, True, 1)])
    assert torch.tensor(found).div(1e-5).isfinite().all()


def test_bias_and_mask() -> None:
    logits = LOGITS.clone()
    apply_bias(logits, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 3]), torch.tensor([1.0, -100.0, 0.5]))
    apply_mask(logits, torch.tensor([0, 0, 0]), torch.tensor([1, 1, 2]))
    assert logits.tolist() == [[3.0, -torch.inf, -torch.inf, 1.0], [-98.0, -2.0, 0.5, 1.5]]
