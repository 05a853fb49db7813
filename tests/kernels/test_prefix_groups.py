"""When seqs read a common prefix together: the bytes saved, and the runs of seqs that are found."""

import pytest

from kernels.upcoming.prefix_groups import KVShape, PrefixGroup, choose_prefix_groups, prefix_saving_bytes

LLAMA_8B = KVShape(num_q_heads=32, num_kv_heads=8, head_dim=128, block_size=16, element_size=2)
KV_BYTES = 2 * 8 * 128 * 2  # a token, a layer
MERGE_BYTES = 32 * (4 * 128 * 2 + 16)  # a query token


@pytest.mark.parametrize(
    ("num_new", "readings_saved"),
    [
        ([1], 0),
        ([1] * 8, 7),  # 8 tokens with 4 heads each fill half a pass
        ([1] * 32, 30),  # two passes together
        ([17, 17], 1),  # alone, each takes two passes of 16 tokens; together, 34 tokens take three
        ([64, 64], 0),  # full passes either way
    ],
)
def test_the_saving_is_the_reads_of_the_prefix_minus_the_merge(num_new: list[int], readings_saved: int) -> None:
    for num_prefix_tokens in (16, 4096):
        expected = readings_saved * num_prefix_tokens * KV_BYTES - sum(num_new) * MERGE_BYTES
        assert prefix_saving_bytes(num_prefix_tokens, num_new, LLAMA_8B) == expected


def tables(*prefixes: range, tail: int = 3) -> list[list[int]]:
    """Block tables that begin with these blocks and continue with blocks of their own."""
    return [[*prefix, *range(1000 * seq, 1000 * seq + tail)] for seq, prefix in enumerate(prefixes, 1)]


def choose(block_tables: list[list[int]], num_new: int = 1, launch_bytes: int = 0) -> list[PrefixGroup]:
    seq_lens = [16 * len(table) - 5 for table in block_tables]
    return choose_prefix_groups(block_tables, seq_lens, [num_new] * len(seq_lens), LLAMA_8B, launch_bytes=launch_bytes)


def test_runs_of_seqs_with_a_common_prefix_are_groups() -> None:
    found = choose(tables(range(40), range(40), range(30), range(100, 100), range(200, 290), range(200, 290)))
    assert found == [
        PrefixGroup(first_seq=0, num_seqs=3, num_blocks=30),
        PrefixGroup(first_seq=4, num_seqs=2, num_blocks=90),
    ]


def test_a_prefix_ends_before_new_tokens_and_blocks_that_are_not_full() -> None:
    """Copies of one seq, like branches of a draft before they write: their last block holds new tokens."""
    copies = [list(range(50))] * 4
    assert choose(copies, num_new=1) == [PrefixGroup(first_seq=0, num_seqs=4, num_blocks=49)]
    assert choose(copies, num_new=12) == [PrefixGroup(first_seq=0, num_seqs=4, num_blocks=48)]


def test_groups_that_save_too_little_are_not_formed() -> None:
    short = tables(range(1), range(1), tail=40)
    saving = prefix_saving_bytes(16, [1, 1], LLAMA_8B)
    assert saving < 0
    assert choose(short) == []
    long = tables(range(40), range(40))
    saving = prefix_saving_bytes(40 * 16, [1, 1], LLAMA_8B)
    assert choose(long, launch_bytes=saving - 1)
    assert choose(long, launch_bytes=saving) == []


def test_empty_tables_share_nothing() -> None:
    assert choose_prefix_groups([[], [], list(range(9))], [0, 0, 140], [0, 0, 1], LLAMA_8B, launch_bytes=0) == []
    assert choose_prefix_groups([], [], [], LLAMA_8B) == []
