"""Rows of a queued round that a later round has made useless."""

from pathlib import Path

import pytest

from echelon.pb.worker_pb2 import Round, RoundResult
from tests.helpers.engines import DRAFT, drive, make_engine
from tests.helpers.rounds import Driver, Seq, seeded
from tests.helpers.tiny_models import make_tiny_model
from workers.engine.engine import Engine

PROMPT = [5, 99, 3, 14, 15]
OTHER = 77


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny")).folder


class Fixture:
    """An engine with a chain of four drafts, the last without KV, and a round that lets it grow, not sent yet."""

    def __init__(self, tiny: Path) -> None:
        self.engine: Engine = make_engine(tiny, DRAFT)
        self.driver: Driver = drive(self.engine)
        self.seq: Seq = self.driver.start(0, PROMPT, seeded())
        self.driver.run((self.seq, self.driver.draft_row(self.seq, 4)))
        self.grow = self.driver.draft_row(self.seq, 3)
        self.growing = self.driver.round([self.grow])

    def run(self, round_: Round, queued: list[Round]) -> RoundResult:
        self.engine.check(round_, queued)
        return self.engine.run(round_)


@pytest.fixture
def fixture(tiny: Path) -> Fixture:
    return Fixture(tiny)


def fresh_drafts(tiny: Path, history: list[int], num_drafts: int) -> list[int]:
    driver = drive(make_engine(tiny, DRAFT))
    seq = driver.start(0, history, seeded())
    driver.inits[0].num_prompt_tokens = len(PROMPT)
    (result,) = driver.run((seq, driver.draft_row(seq, num_drafts)))
    return list(result.token_ids)


@pytest.mark.parametrize("crop_len", range(len(PROMPT), len(PROMPT) + 4))
def test_a_chain_that_is_cut_meanwhile_does_not_grow(fixture: Fixture, tiny: Path, crop_len: int) -> None:
    driver, seq = fixture.driver, fixture.seq
    restart = driver.draft_row(seq, 3, crop_len=crop_len, append=[OTHER])
    restarting = driver.round([restart])
    overtaken = fixture.run(fixture.growing, [restarting])
    assert (list(overtaken.rows[0].token_ids), overtaken.num_steps) == ([], 0)
    (result,) = fixture.run(restarting, []).rows
    assert list(result.token_ids) == fresh_drafts(tiny, [*seq.token_ids], 3)


def test_a_chain_whose_last_token_is_kept_grows(fixture: Fixture, tiny: Path) -> None:
    """That token has no KV until the round has run."""
    restart = Round(
        round_id=99, rows=[{"slot": 0, "crop_len": len(fixture.seq.token_ids), "append_token_ids": [OTHER]}]
    )
    assert len(fixture.run(fixture.growing, [restart]).rows[0].token_ids) == 3


def test_a_slot_that_is_freed_meanwhile_does_nothing(fixture: Fixture) -> None:
    freeing = fixture.driver.round([], free_slots=[0])
    assert not fixture.run(fixture.growing, [freeing]).rows[0].token_ids
    assert fixture.run(fixture.driver.round([]), []).rows == []


def test_a_branch_lives_on_when_its_parent_is_overtaken(fixture: Fixture, tiny: Path) -> None:
    """A foreseen verdict frees the chain's slot while a round is queued in which chain and branch were to grow."""
    driver = fixture.driver
    branch = driver.fork(fixture.seq, 1, len(PROMPT) + 2)
    rows = [driver.draft_row(branch, 3, append=[OTHER]), fixture.grow]
    results = fixture.run(driver.round(rows), [driver.round([], free_slots=[0])]).rows
    assert list(results[0].token_ids) == fresh_drafts(tiny, branch.token_ids, 3)
    assert not results[1].token_ids


def test_an_overtaken_row_still_calibrates(fixture: Fixture) -> None:
    fixture.grow.calibrate_len = 2
    round_ = fixture.driver.round([fixture.grow])
    assert fixture.run(round_, [fixture.driver.round([], free_slots=[0])]).rows[0].token_ids


def test_an_overtaken_row_still_changes_its_slot(fixture: Fixture, tiny: Path) -> None:
    """The blocks and tokens that the row brings are not sent again."""
    driver, seq = fixture.driver, fixture.seq
    fixture.run(fixture.growing, [])
    seq.token_ids += [0, 0, 0]  # stand for the drafts, which are cut
    seq.num_computed = len(seq.token_ids) - 1
    first = driver.draft_row(seq, 12, crop_len=len(PROMPT) + 1, append=[OTHER])  # brings the blocks for both
    second = driver.draft_row(seq, 4, crop_len=len(PROMPT), append=[OTHER, OTHER])
    rounds = [driver.round([first]), driver.round([second])]
    assert not fixture.run(rounds[0], [rounds[1]]).rows[0].token_ids
    assert list(fixture.run(rounds[1], []).rows[0].token_ids) == fresh_drafts(tiny, seq.token_ids, 4)
