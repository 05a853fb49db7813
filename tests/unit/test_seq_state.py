"""The table of seqs, and the batches built from it."""

import pytest
import torch

from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import SeqInit
from workers.engine.seq_state import Limits, SeqTable
from workers.sampling.state import SeqSamplingState

CPU = torch.device("cpu")
LIMITS = Limits(num_slots=4, max_model_len=20, vocab_size=100, block_size=4, num_blocks=30, max_num_batched_tokens=64)
PENALISED = SeqSampling(top_p=1.0, repetition_penalty=1.0, presence_penalty=1.0)


def init(slot: int, num_tokens: int, *, num_computed: int, blocks: list[int], num_prompt: int = 1) -> SeqInit:
    return SeqInit(
        slot=slot,
        token_ids=[10 * slot + i for i in range(num_tokens)],
        num_prompt_tokens=num_prompt,
        num_computed_tokens=num_computed,
        block_table=blocks,
        sampling=PENALISED,
    )


@pytest.fixture
def table() -> SeqTable:
    table = SeqTable(LIMITS)
    table.init(init(2, 7, num_computed=3, blocks=[9, 4]))
    table.init(init(0, 5, num_computed=4, blocks=[7, 1]))
    return table


def test_a_batch_holds_the_tokens_without_kv_at_their_places(table: SeqTable) -> None:
    batch = table.pack([2, 0], [3, 1])
    assert batch.input_ids.tolist() == [23, 24, 25, 4]
    assert batch.positions.tolist() == [3, 4, 5, 4]
    assert batch.slot_mapping.tolist() == [9 * 4 + 3, 4 * 4 + 0, 4 * 4 + 1, 1 * 4 + 0]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4]
    assert batch.seq_lens.tolist() == [6, 5]
    assert batch.block_table.tolist() == [[9, 4], [7, 1]]
    assert (batch.input_ids.dtype, batch.block_table.dtype) == (torch.int64, torch.int32)


def test_tokens_join_several_histories_at_once(table: SeqTable) -> None:
    table.append([2, 0], [[60, 61], [62]])
    assert table.pack([0, 2], [2, 6]).input_ids.tolist() == [4, 62, 23, 24, 25, 26, 60, 61]


def test_drafts_after_the_history_are_read_but_do_not_join_it(table: SeqTable) -> None:
    table.put_drafts(0, [50, 51])
    assert table.pack([0], [3]).input_ids.tolist() == [4, 50, 51]
    assert table.lengths[0] == 5


def test_a_crop_makes_kv_stale_and_takes_tokens_out_of_the_counts(table: SeqTable) -> None:
    table.append([0], [[60, 61]])
    table.num_computed[0] = 7
    table.crop(0, 5)
    table.append([0], [[62]])
    assert (table.lengths[0], table.num_computed[0]) == (6, 5)
    assert table.pack([0], [1]).input_ids.tolist() == [62]
    counts = table.sampling(0).counts_behind([])
    assert counts is not None
    assert {int(token) for token, n in zip(counts.token_ids, counts.output_counts, strict=True) if n} == {
        1,
        2,
        3,
        4,
        62,
    }


def test_new_blocks_follow_the_old_ones(table: SeqTable) -> None:
    table.append([0], [[60, 61, 62, 63]])
    table.add_blocks(0, [20])
    assert table.pack([0], [5]).block_table.tolist() == [[7, 1, 20]]


def test_a_freed_slot_takes_another_seq(table: SeqTable) -> None:
    table.free(2)
    assert not table.holds(2)
    table.init(init(2, 2, num_computed=0, blocks=[3]))
    state = table.state(2)
    assert (state.length, state.num_computed, state.num_blocks, state.num_prompt) == (2, 0, 1, 1)


def test_a_branch_counts_its_own_tokens() -> None:
    parent = SeqSamplingState(PENALISED, [1, 2], vocab_size=100)
    parent.extend([3, 3])
    branch = parent.branch(3)
    branch.extend([4])
    parent.extend([3])
    for state, expected in ((branch, {1: 0, 2: 0, 3: 1, 4: 1}), (parent, {1: 0, 2: 0, 3: 3})):
        counts = state.counts_behind([])
        assert counts is not None
        assert dict(zip(counts.token_ids.tolist(), counts.output_counts.tolist(), strict=True)) == expected
    assert (branch.length, parent.length) == (4, 5)
