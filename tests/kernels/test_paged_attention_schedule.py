"""Which program computes what: every new token once, equal shares of keys for unequal lengths, without asking the
device."""

import numpy as np
import pytest
import torch

from kernels.attention import paged_attention
from kernels.attention import schedule as attention_schedule
from kernels.attention.paged_kv import SeqLengths
from kernels.attention.schedule import Schedule, Settings, make_schedule

CPU = torch.device("cpu")


def schedule(seqs: list[tuple[int, int]], *, group: int = 4, tree: bool = False, invariant: bool = False) -> Schedule:
    """The schedule of seqs (length, new tokens) with 8 KV heads of 128 features in 16 bits: key tiles of 64."""
    settings = Settings(
        head_dim=128,
        element_size=2,
        num_kv_heads=8,
        group=group,
        sliding_window=None,
        tree=tree,
        batch_invariant=invariant,
    )
    return make_schedule(settings, lengths(seqs), device=CPU)


def lengths(seqs: list[tuple[int, int]]) -> SeqLengths:
    new = np.array([0] + [new for _, new in seqs], np.int32)
    return SeqLengths(np.array([length for length, _ in seqs], np.int32), new.cumsum(dtype=np.int32))


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_schedule, "resident_programs", lambda device: 2 * 132)


def test_unequal_lengths_make_equal_work() -> None:
    work = schedule([(64_000, 1), (64, 1), (1000, 5), (17_000, 1)]).split
    assert work is not None
    assert work.num_programs == 264
    assert work.tile_starts.tolist() == [0, 1000, 1001, 1017, 1283]
    # Program p begins with key tile p * 1283 * 8 // 264 of all heads.
    begins = [p * 1283 * 8 // 264 % 1283 for p in range(264)]
    expected = [max(i for i in range(4) if work.tile_starts[i] <= begin) for begin in begins]
    assert work.first_query_tiles.tolist() == expected


def test_little_work_takes_few_programs() -> None:
    work = schedule([(64, 1)]).split
    assert work is not None
    assert work.num_programs == 4  # 8 heads of a key tile each


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_new_token_is_in_one_query_tile(group: int, invariant: bool) -> None:
    seqs = [(5000, 4000), (300, 1), (40, 0), (0, 0), (64, 64), (700, 9), (2000, 2000)]
    chosen = schedule(seqs, group=group, invariant=invariant)
    tokens = []
    for work in (chosen.split, chosen.whole):
        if work is not None:
            size = work.tiling.rows // group
            tokens += [(s, t) for s, first in work.query_tiles.tolist() for t in range(first, first + size)]
    existing = {(s, t) for s, (_, new) in enumerate(seqs) for t in range(new)}
    assert len(tokens) == len(set(tokens))
    assert existing <= set(tokens)
    assert (chosen.split is None) == invariant


def test_only_chunks_that_fill_the_device_are_not_split() -> None:
    many, few = schedule([(4000, 2000), (900, 1)]), schedule([(40_000, 40), (900, 1)])
    assert many.whole is not None
    assert many.whole.query_tiles[:, 0].unique().tolist() == [0]
    assert few.whole is None
    assert schedule([(4000, 64)] * 30, tree=True).whole is None


def test_the_longest_stretch_of_keys_starts_first() -> None:
    work = schedule([(1000, 1000), (9000, 1000)]).whole
    assert work is not None
    seq_of = work.query_tiles[:, 0].tolist()
    assert seq_of == sorted(seq_of, reverse=True)


def test_a_launch_finds_all_lists_aligned() -> None:
    """Triton would compile the kernel again for an unaligned list, while requests wait."""
    for seqs in ([(900, 1)] * 3, [(64, 1), (17_000, 5)], [(1, 1)]):
        work = schedule(seqs).split
        assert work is not None
        lists = (work.query_tiles, work.tile_starts, work.first_query_tiles, work.counters)
        assert [numbers.data_ptr() % 16 for numbers in lists] == [0] * 4
        assert not work.counters.any()
        assert len(work.counters) == 8 * len(work.query_tiles)


def test_known_lengths_are_not_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> SeqLengths:
        raise AssertionError("a step waited for its device")

    monkeypatch.setattr(SeqLengths, "read", read)
    known = lengths([(20, 2)])
    plan = paged_attention.plan_attention(
        torch.zeros(1, 2, dtype=torch.int32),
        torch.from_numpy(known.seq_lens),
        torch.from_numpy(known.cu_seqlens_q),
        num_tokens=2,
        num_blocks=4,
        block_size=16,
        lengths=known,
    )
    assert plan.lengths is known
