"""The estimate of how likely a draft is accepted."""

from random import Random

import pytest

from scheduler.policy.acceptance import Acceptance, AcceptancePrior, expected_tokens


def verdicts(acceptance: Acceptance, rate: float, num_drafts: list[int], *, num_rounds: int, seed: int = 1) -> None:
    random = Random(seed)
    for index in range(num_rounds):
        count = num_drafts[index % len(num_drafts)]
        accepted = next((i for i in range(count) if random.random() >= rate), count)
        acceptance.observe(accepted, count)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("num_drafts", [[1], [8], [1, 2, 4, 8]])
def test_the_number_of_drafts_does_not_bias_the_estimate(rate: float, num_drafts: list[int]) -> None:
    rates = []
    for seed in range(30):
        acceptance = Acceptance.start(AcceptancePrior())
        verdicts(acceptance, rate, num_drafts, num_rounds=200, seed=seed)
        rates.append(acceptance.rate)
    assert sum(rates) / len(rates) == pytest.approx(rate, abs=0.02)


def test_a_new_seq_starts_from_what_others_have_shown() -> None:
    prior = AcceptancePrior()
    assert Acceptance.start(prior).rate > 0.5, "a draft is taken to be good until verdicts come"
    for seed in range(10):
        verdicts(Acceptance.start(prior), 0.2, [4], num_rounds=30, seed=seed)
    assert Acceptance.start(prior).rate == pytest.approx(0.2, abs=0.07)


def test_a_few_verdicts_expose_a_useless_draft() -> None:
    acceptance = Acceptance.start(AcceptancePrior())
    verdicts(acceptance, 0.0, [4], num_rounds=10)
    assert acceptance.rate < 0.1


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.3), (0.1, 0.8)])
def test_a_change_of_the_text_is_noticed_quickly(before: float, after: float) -> None:
    acceptance = Acceptance.start(AcceptancePrior())
    verdicts(acceptance, before, [4], num_rounds=300)
    verdicts(acceptance, after, [4], num_rounds=30, seed=2)
    assert acceptance.rate == pytest.approx(after, abs=0.15)


def test_a_verdict_without_drafts_teaches_nothing() -> None:
    acceptance = Acceptance.start(AcceptancePrior())
    before = acceptance.rate
    acceptance.observe(0, 0)
    assert acceptance.rate == before


def test_expected_tokens() -> None:
    assert expected_tokens(0.5, 0) == 1.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)
    assert expected_tokens(1.0, 8) == 9.0
    assert expected_tokens(0.99995, 8) == pytest.approx(expected_tokens(0.9999, 8), abs=0.01), "no jump near 1"
