"""Approximate KV of drafts, as layer-parallel drafting leaves it, and the pass that replaces it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from echelon.pb.worker_pb2 import Row
from tests.helpers.engines import DRAFT, assemble_draft, drive, make_engine
from tests.helpers.rounds import Driver, Seq, greedy, seeded
from tests.helpers.tiny_models import make_tiny_model
from workers.engine.engine import ModelRunner
from workers.engine.seq_state import SeqTable
from workers.models.batch import Batch

PROMPT = [5, 99, 3, 14, 15, 92]
OTHER = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class BlurredRunner(ModelRunner):
    """Its drafting steps leave KV and hidden states that differ from the model's. Logs what goes through the model."""

    log: list[tuple[str, list[int]]] = field(default_factory=list)  # which forward, positions

    def forward(self, batch: Batch) -> Tensor:
        self.log.append(("exact", batch.positions.tolist()))
        return ModelRunner.forward(self, batch)

    def draft_forward(self, batch: Batch) -> Tensor:
        self.log.append(("draft", batch.positions.tolist()))
        hidden = ModelRunner.forward(self, batch)
        for layer in self.kv_caches:
            for cache in layer:
                cache.flatten(0, 1)[batch.slot_mapping] *= 1.25
        return hidden.roll(1, dims=1)


@dataclass(frozen=True, slots=True)
class Blurred:
    """A draft engine with a blurred runner."""

    table: SeqTable
    runner: BlurredRunner
    driver: Driver

    def kv(self, slot: int, start: int, end: int) -> Tensor:
        """KV at positions start to end - 1: [num_layers, 2, end - start, kv_size]."""
        block_size = self.driver.info.block_size
        table = torch.from_numpy(self.table.block_table[slot]).long()
        positions = torch.arange(start, end)
        places = table[positions // block_size] * block_size + positions % block_size
        return torch.stack(
            [
                torch.stack([cache.flatten(0, 1)[places].flatten(1) for cache in layer])
                for layer in self.runner.kv_caches
            ]
        )

    def steps(self) -> list[tuple[str, list[int]]]:
        """What went through the model since the last call."""
        steps = list(self.runner.log)
        self.runner.log.clear()
        return steps

    def start(self, *, slot: int = 0, num_drafts: int = 5) -> Seq:
        """Makes a prompt and a chain; all tokens of the chain but the last have approximate KV."""
        seq = self.driver.start(slot, PROMPT, seeded(3))
        self.driver.run((seq, self.driver.draft_row(seq, num_drafts)))
        return seq


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny")).folder


def make_blurred(tiny: Path) -> Blurred:
    parts = assemble_draft(tiny, BlurredRunner, is_approximate=True)
    assert isinstance(parts.runner, BlurredRunner)
    return Blurred(parts.table, parts.runner, drive(parts.engine))


@pytest.fixture
def blurred(tiny: Path) -> Blurred:
    return make_blurred(tiny)


def exact_kv(tiny: Path, token_ids: Sequence[int]) -> Tensor:
    """The KV of a fresh prefill."""
    fresh = make_blurred(tiny)
    seq = fresh.driver.start(0, token_ids, greedy())
    fresh.driver.run((seq, fresh.driver.draft_row(seq, 0)))
    return fresh.kv(0, 0, len(token_ids))


def is_exact(blurred: Blurred, tiny: Path, seq: Seq) -> list[bool]:
    """For each token of a seq that has KV: whether that KV is exact."""
    found = blurred.kv(seq.slot, 0, seq.num_computed)
    expected = exact_kv(tiny, seq.token_ids[: seq.num_computed])
    return [torch.allclose(found[:, :, i], expected[:, :, i], atol=1e-5) for i in range(seq.num_computed)]


def first_wrong(exact: list[bool]) -> int:
    assert exact == sorted(exact, reverse=True), "exact KV comes first"
    return sum(exact)


NUM_PROMPT = len(PROMPT)


def test_the_history_is_exact_and_drafts_are_not(blurred: Blurred, tiny: Path) -> None:
    seq = blurred.start(num_drafts=3)
    assert blurred.steps() == [("exact", [0, 1, 2, 3, 4, 5]), ("draft", [6]), ("draft", [7])]
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT


def test_the_first_draft_after_a_history_is_that_of_the_exact_model(blurred: Blurred, tiny: Path) -> None:
    exact = drive(make_engine(tiny, DRAFT))
    seq = exact.start(0, PROMPT, seeded(3))
    (expected,) = exact.run((seq, exact.draft_row(seq, 1)))
    assert blurred.start(num_drafts=5).output[:1] == list(expected.token_ids)


@pytest.mark.parametrize("num_accepted", [0, 1, 2, 4])
def test_a_mismatch_calibrates_with_the_correction_in_one_forward(
    blurred: Blurred, tiny: Path, num_accepted: int
) -> None:
    """Then the chain continues like that of a fresh seq with this history."""
    driver, seq = blurred.driver, blurred.start()
    base = NUM_PROMPT + num_accepted
    blurred.steps()
    driver.run((seq, driver.draft_row(seq, 3, crop_len=base, append=[OTHER], calibrate_len=num_accepted)))
    assert blurred.steps() == [
        ("exact", list(range(NUM_PROMPT, base + 1))),
        ("draft", [base + 1]),
        ("draft", [base + 2]),
    ]
    assert first_wrong(is_exact(blurred, tiny, seq)) == base + 1
    fresh = make_blurred(tiny)
    other = fresh.driver.start(0, seq.token_ids[: base + 1], seeded(3))
    fresh.driver.run((other, fresh.driver.draft_row(other, 3)))
    assert seq.token_ids == other.token_ids


@pytest.mark.parametrize("num_agreed", [1, 3, 4])
def test_a_chain_continues_after_calibrated_tokens(blurred: Blurred, tiny: Path, num_agreed: int) -> None:
    """Drafts that are not verified yet stay: the exact forward comes first, and the steps after it read its KV."""
    driver, seq = blurred.driver, blurred.start()
    blurred.steps()
    driver.run((seq, driver.draft_row(seq, 2, calibrate_len=num_agreed)))
    calibrated = list(range(NUM_PROMPT, NUM_PROMPT + num_agreed))
    last = NUM_PROMPT + 4
    assert blurred.steps() == [("exact", calibrated), ("draft", [last]), ("draft", [last + 1])]
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT + num_agreed


def test_a_chain_that_grows_by_one_a_round_is_approximate_too(blurred: Blurred, tiny: Path) -> None:
    driver, seq = blurred.driver, blurred.start(num_drafts=1)
    blurred.steps()
    for position in range(NUM_PROMPT, NUM_PROMPT + 3):
        driver.run((seq, driver.draft_row(seq, 1)))
        assert blurred.steps() == [("draft", [position])]
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT


def test_tokens_computed_after_approximate_kv_need_calibration(blurred: Blurred, tiny: Path) -> None:
    """A commit that is longer than the chain is appended without calibration; later all of it is calibrated."""
    driver, seq = blurred.driver, blurred.start(num_drafts=3)
    blurred.steps()
    driver.run((seq, driver.draft_row(seq, 2, append=[OTHER])))
    assert blurred.steps() == [("exact", [8, 9]), ("draft", [10])]
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT
    driver.run((seq, driver.draft_row(seq, 1, calibrate_len=4)))
    assert blurred.steps() == [("exact", [6, 7, 8, 9]), ("draft", [11])]
    assert first_wrong(is_exact(blurred, tiny, seq)) == 10


def test_a_token_of_the_target_is_never_computed_approximately(blurred: Blurred) -> None:
    """Not even a single token after approximate KV: it starts a chain."""
    driver, seq = blurred.driver, blurred.start()
    blurred.steps()
    driver.run((seq, driver.draft_row(seq, 2, crop_len=NUM_PROMPT + 2, append=[OTHER])))
    assert blurred.steps() == [("exact", [NUM_PROMPT + 2]), ("draft", [NUM_PROMPT + 3])]


def test_a_chunk_follows_a_calibration_that_falls_short(blurred: Blurred, tiny: Path) -> None:
    driver, seq = blurred.driver, blurred.start(num_drafts=4)
    other = blurred.start(slot=1, num_drafts=1)
    blurred.steps()
    row = driver.draft_row(seq, 1, append=[OTHER], calibrate_len=1)
    results = driver.send(driver.round([row, driver.draft_row(other, 1)]))
    assert blurred.steps() == [("exact", [6]), ("exact", [9, 10]), ("draft", [6])]
    assert results.num_steps == 3
    driver.book(seq, row, results.rows[0])
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT + 1


def test_a_row_may_calibrate_only(blurred: Blurred, tiny: Path) -> None:
    driver, seq = blurred.driver, blurred.start()
    blurred.steps()
    (result,) = driver.send(driver.round([Row(slot=0, calibrate_len=2)])).rows
    assert not result.token_ids
    assert blurred.steps() == [("exact", [6, 7])]
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT + 2
    driver.run((seq, driver.draft_row(seq, 1, calibrate_len=90)))
    assert first_wrong(is_exact(blurred, tiny, seq)) == seq.num_computed - 1


def test_everything_exact_takes_one_forward_followed_by_steps_for_all_chains(blurred: Blurred) -> None:
    driver = blurred.driver
    goes_on, corrected = blurred.start(num_drafts=3), blurred.start(slot=1, num_drafts=3)
    newcomer = driver.start(2, [1, 2, 3], greedy())
    blurred.steps()
    work = [
        (goes_on, driver.draft_row(goes_on, 2, calibrate_len=1)),
        (corrected, driver.draft_row(corrected, 3, crop_len=7, append=[OTHER], calibrate_len=1)),
        (newcomer, driver.draft_row(newcomer, 1)),
    ]
    results = driver.run(*work)
    assert blurred.steps() == [("exact", [6, 6, 7, 0, 1, 2]), ("draft", [8, 8]), ("draft", [9, 9])]
    assert [len(result.token_ids) for result in results] == [2, 3, 1]


def test_a_branch_inherits_what_is_exact(blurred: Blurred, tiny: Path) -> None:
    driver, parent = blurred.driver, blurred.start()
    driver.send(driver.round([Row(slot=0, calibrate_len=2)]))
    branch = driver.fork(parent, 1, NUM_PROMPT + 3)
    driver.run((branch, driver.draft_row(branch, 1, append=[OTHER], calibrate_len=1)))
    assert first_wrong(is_exact(blurred, tiny, branch)) == branch.num_computed
    assert first_wrong(is_exact(blurred, tiny, parent)) == NUM_PROMPT + 2


def test_stale_exact_kv_is_not_taken_for_that_of_other_tokens(blurred: Blurred, tiny: Path) -> None:
    driver, seq = blurred.driver, blurred.start()
    driver.send(driver.round([Row(slot=0, calibrate_len=4)]))
    driver.run((seq, driver.draft_row(seq, 4, crop_len=NUM_PROMPT, append=[OTHER])))
    driver.run((seq, driver.draft_row(seq, 1, calibrate_len=2)))
    assert first_wrong(is_exact(blurred, tiny, seq)) == NUM_PROMPT + 3
