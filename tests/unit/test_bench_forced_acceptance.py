"""Forced acceptance commits the wanted share of drafts, right or wrong, and no deployment file can switch it on."""

import json
import logging
from pathlib import Path

import pytest

from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.schema import json_schema
from cluster.errors import ConfigError
from tests.helpers.engines import TARGET, drive, make_engine
from tests.helpers.rounds import Seq, seeded
from tests.helpers.tiny_models import TinyModel, make_tiny_model
from workers.engine.target_engine import TargetEngine

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMPT = [5, 99, 3, 14]
DRAFTS = [11, 12, 13, 14]
NUM_SEEDS = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny"))


def commit(tiny: TinyModel, rate: float) -> list[tuple[int, list[int]]]:
    """For each of many seeds: how many of DRAFTS are accepted, and what is committed."""
    driver = drive(make_engine(tiny.folder, TARGET, forced_acceptance=rate))
    verdicts = []
    for first_seed in range(0, NUM_SEEDS, 4):
        seqs: list[Seq] = [driver.start(slot, PROMPT, seeded(first_seed + slot)) for slot in range(4)]
        rows = [driver.target_row(seq, drafts=DRAFTS) for seq in seqs]
        results = driver.send(driver.round(rows)).rows
        verdicts += [(result.num_accepted_tokens, list(result.token_ids)) for result in results]
        driver.send(driver.round([], free_slots=range(4)))
        driver.free_blocks = list(range(driver.info.num_blocks))
    return verdicts


def test_drafts_are_committed_at_the_rate_asked_for(tiny: TinyModel) -> None:
    verdicts = commit(tiny, 0.75)
    trials = sum(min(num_accepted + 1, len(DRAFTS)) for num_accepted, _ in verdicts)
    assert sum(num_accepted for num_accepted, _ in verdicts) / trials == pytest.approx(0.75, abs=0.08)
    assert all(token_ids[:-1] == DRAFTS[:num_accepted] for num_accepted, token_ids in verdicts)


def test_the_same_seeds_decide_alike(tiny: TinyModel) -> None:
    assert commit(tiny, 0.5) == commit(tiny, 0.5)


def test_rates_of_zero_and_one(tiny: TinyModel) -> None:
    plain, all_right = commit(tiny, 0.0), commit(tiny, 1.0)
    assert all(num_accepted == len(DRAFTS) for num_accepted, _ in all_right)
    assert sum(num_accepted for num_accepted, _ in plain) < NUM_SEEDS  # these drafts are as good as random


def test_forced_acceptance_logs_a_warning(tiny: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_engine(tiny.folder, TARGET), TargetEngine)
        assert not caplog.messages
        make_engine(tiny.folder, TARGET, forced_acceptance=0.5)
    assert "THE OUTPUT IS NOT THE MODEL'S" in caplog.text


def test_a_rate_outside_zero_to_one_is_refused(tiny: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"forced_acceptance 1.5 must be between 0 and 1"):
        make_engine(tiny.folder, TARGET, forced_acceptance=1.5)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_deployment_can_ask_for_it(file: Path, tmp_path: Path) -> None:
    assert load_deployment(file).forced_acceptance == 0
    asking = tmp_path / "asking.yaml"
    asking.write_text(file.read_text() + "\nforced_acceptance: 0.5\n")
    with pytest.raises(ConfigError, match="forced_acceptance: unknown key"):
        load_deployment(asking)
    assert "forced" not in json.dumps(json_schema())
