"""How likely a draft is to be accepted, estimated from its confidence and the verdicts on other drafts."""

import random

import pytest

from scheduler.policy.confidence import Calibration


def rate(calibration: Calibration, confidence: float) -> float:
    return calibration.rate(confidence, 0.8, 0.8)


@pytest.mark.parametrize("confidence", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_without_verdicts_the_confidence_is_believed(confidence: float) -> None:
    assert rate(Calibration(), confidence) == pytest.approx(confidence)


def test_verdicts_overrule_an_overconfident_draft() -> None:
    calibration = Calibration()
    rng = random.Random(1)
    for _ in range(2000):
        confidence = rng.uniform(0.2, 1.0)
        calibration.observe(confidence, accepted=rng.random() < 0.5 * confidence)
    for confidence in (0.3, 0.6, 0.85):
        assert rate(calibration, confidence) == pytest.approx(0.5 * confidence, abs=0.12)
    assert rate(calibration, 0.05) == pytest.approx(0.05), "of other confidences nothing was learned"


def test_old_verdicts_are_forgotten() -> None:
    calibration = Calibration()
    for accepted in (True, False):
        for _ in range(1500):
            calibration.observe(0.7, accepted=accepted)
    assert rate(calibration, 0.7) < 0.1


def test_a_seq_with_better_drafts_than_most_gets_better_odds() -> None:
    calibration = Calibration()
    better, worse = calibration.rate(0.6, 0.9, 0.8), calibration.rate(0.6, 0.6, 0.8)
    assert worse < rate(calibration, 0.6) < better
    assert better / (1 - better) == pytest.approx(0.6 / 0.4 * (0.9 / 0.1) * (0.2 / 0.8))
