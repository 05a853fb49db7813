"""Branches of a draft engine: a fork computes what a fresh seq with the same history would."""

from pathlib import Path
from typing import Any

import pytest

from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import Fork, Row, SeqInit
from tests.helpers.engines import DRAFT, MAX_MODEL_LEN, POISON, TARGET, drive, make_engine, poisoned_model
from tests.helpers.rounds import Driver, Seq, greedy, seeded
from tests.helpers.tiny_models import make_tiny_model
from workers.engine.rounds import ProtocolError

PROMPT = [5, 99, 3, 14, 15]  # with 4 tokens a block the chain below crosses two borders
BLOCK_SIZE = 4
NUM_DRAFTS = 8
SAMPLINGS = {
    "greedy": greedy(),
    "seeded": seeded(3),
    "penalised": seeded(4, presence_penalty=1.5, repetition_penalty=1.3, frequency_penalty=0.5),
}
LENGTHS = range(len(PROMPT), len(PROMPT) + NUM_DRAFTS + 1)
OTHER = 77  # a token that is not in the chain


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture
def draft(tiny: Path) -> Driver:
    return drive(make_engine(tiny, DRAFT))


def chain(driver: Driver, sampling: SeqSampling, slot: int = 0) -> Seq:
    """A seq with a chain of drafts; the last one has no KV yet."""
    seq = driver.start(slot, PROMPT, sampling)
    driver.run((seq, driver.draft_row(seq, NUM_DRAFTS)))
    return seq


def drafts(driver: Driver, seq: Seq, *append: int) -> tuple[list[int], list[float]]:
    """The next drafts of a seq and their probabilities, which show what it has read."""
    (result,) = driver.run((seq, driver.draft_row(seq, 5, append=append)), confidences=True)
    return list(result.token_ids), list(result.confidences)


def fresh_drafts(tiny: Path, history: list[int], sampling: SeqSampling) -> tuple[list[int], list[float]]:
    driver = drive(make_engine(tiny, DRAFT))
    seq = driver.start(0, history, sampling)
    driver.inits[0].num_prompt_tokens = len(PROMPT)
    return drafts(driver, seq)


def assert_same(found: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("settings", SAMPLINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_branch_drafts_what_a_fresh_seq_drafts(draft: Driver, tiny: Path, settings: str, length: int) -> None:
    sampling = SAMPLINGS[settings]
    parent = chain(draft, sampling)
    branch = draft.fork(parent, 1, length)
    found = drafts(draft, branch, OTHER)
    assert_same(found, fresh_drafts(tiny, [*parent.token_ids[:length], OTHER], sampling))
    assert_same(drafts(draft, parent), fresh_drafts(tiny, parent.token_ids[:-5], sampling))


@pytest.mark.parametrize("length", LENGTHS)
def test_branches_outlive_their_parent(draft: Driver, tiny: Path, length: int) -> None:
    """The parent's slot goes to another seq; its blocks stay in use, as the scheduler keeps shared blocks."""
    parent = chain(draft, SAMPLINGS["penalised"])
    branch = draft.fork(parent, 1, length)
    draft.send(draft.round([]))
    other = draft.start(0, [9, 8, 7], greedy())
    draft.send(draft.round([draft.draft_row(other, 3)], free_slots=[0]))
    expected = fresh_drafts(tiny, [*parent.token_ids[:length], OTHER], SAMPLINGS["penalised"])
    assert_same(drafts(draft, branch, OTHER), expected)


def test_a_branch_can_have_branches(draft: Driver, tiny: Path) -> None:
    """All in one round, while the parent continues: each branch copies the block in which it differs from the
    others."""
    sampling = SAMPLINGS["penalised"]
    parent = chain(draft, sampling)
    child = draft.fork(parent, 1, 11)
    grandchild = draft.fork(child, 2, 10)
    great_grandchild = draft.fork(grandchild, 3, 9)
    seqs = [parent, child, grandchild, great_grandchild]
    rows = [draft.draft_row(parent, 2)] + [
        draft.draft_row(seq, 2, append=[OTHER - i]) for i, seq in enumerate(seqs[1:])
    ]
    histories = [list(seq.token_ids) for seq in seqs]
    draft.run(*zip(seqs, rows, strict=True))
    for seq, history in zip(seqs, histories, strict=True):
        tokens, _ = fresh_drafts(tiny, history, sampling)
        assert seq.token_ids == history + tokens[:2]


def test_a_branch_of_a_seq_that_starts_in_the_same_round(draft: Driver, tiny: Path) -> None:
    parent = draft.start(0, PROMPT, seeded(1))
    draft.inits[0].block_table.extend(draft.blocks_for(parent, len(PROMPT)))
    branch = draft.fork(parent, 1, len(PROMPT))
    assert_same(drafts(draft, branch), fresh_drafts(tiny, PROMPT, seeded(1)))


def test_a_branch_that_is_freed_leaves_its_slot(draft: Driver) -> None:
    parent = chain(draft, greedy())
    draft.fork(parent, 1, 7)
    draft.send(draft.round([]))
    draft.fork(parent, 1, 8)
    draft.send(draft.round([], free_slots=[1]))


# -- chains that ended early ----------------------------------------------------------------------------------------


@pytest.fixture
def short(tiny: Path, tmp_path: Path) -> tuple[Driver, Seq]:
    """A chain of which one of 4 ordered drafts came: after it, logits are not finite."""
    driver = drive(make_engine(poisoned_model(tiny, tmp_path / "poisoned"), DRAFT))
    seq = driver.start(0, PROMPT, greedy(logit_bias={POISON: 100.0}))
    row = driver.draft_row(seq, 4)
    (result,) = driver.run((seq, row))
    assert list(result.token_ids) == [POISON]
    return driver, seq


def test_a_branch_of_tokens_that_never_came_is_void(short: tuple[Driver, Seq]) -> None:
    driver, parent = short
    thought = Seq(0, parent.token_ids + [0, 0, 0], len(PROMPT), len(PROMPT) + 3)
    branch = driver.fork(thought, 1, len(PROMPT) + 3)
    row = driver.draft_row(branch, 2, crop_len=len(PROMPT) + 2, append=[OTHER], calibrate_len=1)
    other = driver.start(3, PROMPT, greedy())
    results = driver.send(driver.round([row, driver.draft_row(other, 2)])).rows
    assert not results[0].token_ids
    assert len(results[1].token_ids) == 2
    driver.fork(branch, 2, len(PROMPT) + 3)
    (result,) = driver.send(driver.round([Row(slot=2, chunk_len=1, num_draft_tokens=1)])).rows
    assert not result.token_ids
    driver.send(driver.round([], free_slots=[1, 2]))
    seq = driver.start(1, [1, 2], greedy())
    driver.run((seq, driver.draft_row(seq, 3)))
    driver.run((seq, driver.draft_row(seq, 3)))
    assert len(seq.output) == 6


def test_a_branch_of_tokens_that_did_come_is_not_void(short: tuple[Driver, Seq], tiny: Path) -> None:
    driver, parent = short
    branch = driver.fork(parent, 1, len(PROMPT))
    settings = greedy(logit_bias={100: 100.0})
    (result,) = driver.run((branch, driver.draft_row(branch, 1, append=[OTHER])))
    assert list(result.token_ids) == fresh_drafts(tiny, [*PROMPT, OTHER], settings)[0][:1]


# -- forks that no scheduler may send -------------------------------------------------------------------------------

BAD_FORKS: dict[str, tuple[dict[str, Any], str]] = {
    "taken": ({"slot": 2}, "slot: is taken"),
    "starts in this round": ({"slot": 5}, "slot: is taken"),
    "slot": ({"slot": 8}, "slot: must be below 8"),
    "own parent": ({"parent_slot": 1}, "parent_slot: slot 1 holds no seq"),
    "no parent": ({"parent_slot": 6}, "parent_slot: slot 6 holds no seq"),
    "parent out of range": ({"parent_slot": 900}, "parent_slot: slot 900 holds no seq"),
    "parent freed": ({"parent_slot": 3}, "parent_slot: slot 3 holds no seq"),
    "in the prompt": ({"length": 4}, "length: 4, must be 5 (prompt) to 13"),
    "beyond the chain": ({"length": 14}, "length: 14, must be 5 (prompt) to 13"),
    "no block": ({"new_block_ids": []}, "new_block_ids: 6 tokens have KV"),
    "block id": ({"new_block_ids": [100_000]}, "new_block_ids: block 100000"),
    "too many blocks": ({"new_block_ids": [9] * 16}, "new_block_ids: make 17 blocks"),
}


@pytest.mark.parametrize("case", BAD_FORKS)
def test_an_impossible_fork_is_refused_and_changes_nothing(draft: Driver, case: str) -> None:
    changes, message = BAD_FORKS[case]
    parent = chain(draft, greedy())
    chain(draft, greedy(), slot=2)
    chain(draft, greedy(), slot=3)
    round_ = draft.round([], free_slots=[3])
    round_.init_seqs.append(SeqInit(slot=5, token_ids=[1], num_prompt_tokens=1, sampling=greedy()))
    round_.forks.append(Fork(**{"slot": 1, "parent_slot": 0, "length": 6, "new_block_ids": [50], **changes}))
    with pytest.raises(ProtocolError) as caught:
        draft.send(round_)
    assert f"round {round_.round_id}: forks[0] (slot {round_.forks[0].slot}): {message}" in str(caught.value)
    draft.fork(parent, 1, 6)
    draft.send(draft.round([]))


def test_a_parent_without_blocks_cannot_share_them(draft: Driver) -> None:
    draft.start(0, PROMPT, greedy())
    round_ = draft.round([])
    round_.forks.append(Fork(slot=1, parent_slot=0, length=len(PROMPT), new_block_ids=[50]))
    with pytest.raises(ProtocolError, match=r"length: 5 fills 1 blocks of 4, but the parent has 0"):
        draft.send(round_)


def test_a_target_has_no_branches(tiny: Path) -> None:
    target = drive(make_engine(tiny, TARGET))
    seq = target.start(0, PROMPT, greedy())
    target.run((seq, target.target_row(seq)))
    target.fork(seq, 1, len(PROMPT))
    with pytest.raises(ProtocolError, match="forks: only a draft engine"):
        target.send(target.round([]))


def test_a_branch_may_fill_the_context(tiny: Path) -> None:
    driver = drive(make_engine(tiny, DRAFT))
    parent = driver.start(0, [7] * (MAX_MODEL_LEN - 3), greedy())
    driver.run((parent, driver.draft_row(parent, 3)))
    branch = driver.fork(parent, 1, MAX_MODEL_LEN - 1)
    (result,) = driver.run((branch, driver.draft_row(branch, 4, append=[OTHER])))
    assert not result.token_ids
    (result,) = driver.send(driver.round([Row(slot=1, chunk_len=1, num_draft_tokens=4)])).rows
    assert not result.token_ids
